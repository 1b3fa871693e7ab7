"""The dspark-ray engine: DeepSeek-V4 with DSpark speculative decoding."""
