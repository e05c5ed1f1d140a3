"""What a run may say: pydantic schema over composed YAML. Never imports torch."""
