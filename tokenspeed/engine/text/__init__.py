"""Text in and out: the checkpoint's tokenizer, chat template and generation defaults. No torch in here."""
