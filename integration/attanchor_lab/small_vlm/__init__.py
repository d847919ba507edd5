"""A real LLaVA made of pretrained parts that come as packages: SmolLM2-135M-Instruct behind EfficientNet-Lite0."""
