"""Language models: what joins the transformer to tokens, where models come from, what is frozen or trained of them."""
