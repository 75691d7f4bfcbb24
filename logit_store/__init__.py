"""The logit store: format, codec, writer, reader, verifier (numpy, pyarrow and zstandard only)."""
