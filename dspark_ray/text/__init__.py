"""From text to tokens and back: tokenizer, streamed decoding, messages of a chat."""
