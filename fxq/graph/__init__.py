"""The intermediate representation: operators, text, edits, patterns, rules, what data flow says; no file."""
