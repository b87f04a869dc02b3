"""Pictures, masks and the part of a picture that the network sees."""
