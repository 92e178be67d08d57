"""Files of embeddings, rewards and preferences; splits of the prompts; annotated pairs."""
