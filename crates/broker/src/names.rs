//! Names of channels: what is allowed, and what a pattern matches.

use crate::refusal::Refusal;

/// Bytes of a name, and of a client id with its group where they are kept.
const LONGEST: usize = 1024;

/// Checks what a position is kept by.
pub(crate) fn check_client(client: &str, group: &str) -> Result<(), Refusal> {
    if client.len() + group.len() > LONGEST {
        return Err(Refusal::because("invalid clientID or group value, together they can have 1024 bytes"));
    }
    Ok(())
}

/// Checks a name to which events or requests are sent, or from which stored events are read.
pub(crate) fn check(name: &str) -> Result<(), Refusal> {
    check_pattern(name)?;
    if name.contains(['*', '>']) {
        return Err(Refusal::wildcard());
    }
    Ok(())
}

/// Checks a name under which events are stored.
pub(crate) fn check_stored(name: &str) -> Result<(), Refusal> {
    check(name)?;
    if name.split('.').any(str::is_empty) { Err(Refusal::queue_name()) } else { Ok(()) }
}

/// Checks a name that may be a pattern.
pub(crate) fn check_pattern(name: &str) -> Result<(), Refusal> {
    if name.is_empty() {
        Err(Refusal::no_channel())
    } else if name.len() > LONGEST {
        Err(Refusal::because("invalid channel value, cannot have more than 1024 bytes"))
    } else if name.contains(char::is_whitespace) {
        Err(Refusal::white_space())
    } else if name.ends_with('.') {
        Err(Refusal::ends_with_dot())
    } else {
        Ok(())
    }
}

/// Checks the name of a queue.
pub(crate) fn check_queue(name: &str) -> Result<(), Refusal> {
    let wrong = name.is_empty()
        || name.len() > LONGEST
        || name.contains(|letter: char| letter.is_whitespace() || letter == '*' || letter == '>')
        || name.split('.').any(str::is_empty);
    if wrong { Err(Refusal::queue_name()) } else { Ok(()) }
}

/// Whether a pattern matches a name: `*` is one token, `>` at the end one or more.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (mut patterns, mut tokens) = (pattern.split('.'), name.split('.'));
    loop {
        match (patterns.next(), tokens.next()) {
            (Some(">"), Some(_)) => return patterns.next().is_none(),
            (Some("*"), Some(_)) => {}
            (Some(wanted), Some(token)) if wanted == token => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_the_protocol_says() {
        for (pattern, name, expected) in [
            ("a", "a", true),
            ("a", "b", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            (">", "a.b", true),
            ("a.>.c", "a.b.c", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn wrong_names_are_refused() {
        for name in ["", "a b", "a\tb", "a.", "a*", "a.>", "a..b", ".a"] {
            assert!(check_queue(name).is_err(), "{name}");
        }
        for name in ["a", "a.b", "ä/b", "A_1-2"] {
            assert!(check_queue(name).is_ok() && check_stored(name).is_ok(), "{name}");
        }
        for name in ["a..b", ".a"] {
            assert_eq!((check(name), check_stored(name)), (Ok(()), Err(Refusal::queue_name())), "{name}");
        }
        assert_eq!(check("a.>"), Err(Refusal::wildcard()));
        assert_eq!(check_pattern("a.>"), Ok(()));
        assert_eq!(check("a b"), Err(Refusal::white_space()));
        assert_eq!(check("a."), Err(Refusal::ends_with_dot()));
    }
}
