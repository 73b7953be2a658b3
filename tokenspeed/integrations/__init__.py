"""The operators under other engines' names: `fla` and `flashinfer` have functions of these libraries' signatures,
`transformers` swaps the operators into a loaded model. docs/integrations.md."""
