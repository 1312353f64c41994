"""The Flight SQL protocol: bytes ⇄ values (`wire`), sealed handles (`handles`), what each command does (`service`)."""
