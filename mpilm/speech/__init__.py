"""From audio to words: features, word HMMs, alignment, decoding, word error rate."""
