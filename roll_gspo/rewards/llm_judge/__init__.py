"""`llm_judge`: a language model behind an OpenAI-compatible endpoint grades the response."""
