"""A small router for one host: requests go where their prefix is, as the engines' cache events tell, or where there is
least to do; prefill and decode may be engines of their own. It has no model and no tokenizer of its own."""
