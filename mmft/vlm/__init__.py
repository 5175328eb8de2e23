"""The one place that knows vision-language models."""
