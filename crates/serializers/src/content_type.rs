//! Content types as the registry compares them: type and subtype, without regard to case or parameters.

/// `type/subtype` of a content type.
pub(crate) fn essence(content_type: &str) -> &str {
    content_type.split_once(';').map_or(content_type, |(essence, _)| essence).trim()
}

/// Whether two content types have the same type and subtype.
pub(crate) fn same(a: &str, b: &str) -> bool {
    essence(a).eq_ignore_ascii_case(essence(b))
}

/// Whether it is `application/<anything>+json`, which RFC 6839 lets any JSON reader read.
pub(crate) fn has_json_suffix(content_type: &str) -> bool {
    let essence = essence(content_type).to_ascii_lowercase();
    essence
        .strip_prefix("application/")
        .and_then(|subtype| subtype.strip_suffix("+json"))
        .is_some_and(|name| !name.is_empty())
}

/// Whether text labelled so can be read as UTF-8. Another character set would decode into wrong characters
/// without an error.
pub(crate) fn is_utf8(content_type: &str) -> bool {
    content_type
        .split(';')
        .skip(1)
        .filter_map(|parameter| parameter.split_once('='))
        .filter(|(name, _)| name.trim().eq_ignore_ascii_case("charset"))
        .map(|(_, charset)| charset.trim().trim_matches('"'))
        .all(|charset| ["utf-8", "utf8", "us-ascii"].iter().any(|known| charset.eq_ignore_ascii_case(known)))
}

/// Whether it has the form `type/subtype`.
pub(crate) fn is_valid(content_type: &str) -> bool {
    let token = |part: &str| !part.is_empty() && !part.contains(|c: char| c.is_whitespace() || c.is_control());
    essence(content_type).split_once('/').is_some_and(|(kind, subtype)| token(kind) && token(subtype))
}
