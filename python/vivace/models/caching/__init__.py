"""Networks whose blocks keep what they give and give what they kept, model by model."""
