"""Between text and tokens: chat template, tokenizer, incremental detokenizer, stop strings."""
