"""Configuration of a run: a pydantic schema over composed YAML. It never imports torch."""
