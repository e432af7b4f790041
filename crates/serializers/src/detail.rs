//! Which part of a format's own error may be shown: what was expected, never what the body held.

/// The harmless part of a serde message: the name of a missing field, or the expectation at its end.
///
/// Serde quotes the offending value before the expectation (`invalid type: string "secret", expected u64`),
/// so only the text after the last `, expected ` is taken: it comes from the Rust type.
pub(crate) fn expectation(message: &str) -> Option<String> {
    if let Some(rest) = message.strip_prefix("missing field `") {
        return rest.split_once('`').map(|(field, _)| format!("the field `{field}` is missing"));
    }
    let quotes_then_expects =
        ["invalid type: ", "invalid value: ", "invalid length "].iter().any(|start| message.starts_with(start));
    if !quotes_then_expects {
        return None;
    }
    message.rsplit_once(", expected ").map(|(_, expected)| format!("expected {expected}"))
}

/// `text` for a message about foreign input: at most 100 characters.
pub(crate) fn shorten(text: &str) -> Box<str> {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text.into(),
    }
}
