"""Files of embeddings, rewards and preferences; prompt splits; annotated pairs."""
