"""Integrations with SDKs and frameworks, one small module each; imports as ``throttle.integrations``."""
