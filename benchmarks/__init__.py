"""Speed, memory and ranking beside a plain reference; one command for each benchmark."""
