//! Content types as a message keeps them: few are in use, so most messages carry a number instead of a text.

use std::{num::NonZeroU8, sync::OnceLock};

use super::check::check_short;

/// A content type that the process knows: one byte in each message, where a text takes three words.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Known(NonZeroU8);

/// Those of the serializers that come with polymq.
const BUILT_IN: [&str; 4] =
    ["application/json", "application/vnd.msgpack", "text/plain; charset=utf-8", "application/octet-stream"];

/// The first ones that the program itself has named. What others send is never added: it has no end.
static NAMED: [OnceLock<Box<str>>; 60] = [const { OnceLock::new() }; 60];

impl Known {
    /// The one with this text, if it is known.
    pub(super) fn find(text: &str) -> Option<Self> {
        let named = || NAMED.iter().map_while(|slot| slot.get().map(AsRef::as_ref));
        Self::at(BUILT_IN.into_iter().chain(named()).position(|known| known == text)?)
    }

    /// The one with this text, known from now on. `None` when there is no place left, or every send would refuse it.
    pub(super) fn remember(text: &str) -> Option<Self> {
        if let Some(known) = Self::find(text) {
            return Some(known);
        }
        check_short("content type", Some(text)).ok()?;
        // Another thread may take a slot meanwhile, for this text too: then it is found there.
        let at = NAMED.iter().position(|slot| **slot.get_or_init(|| text.into()) == *text)?;
        Self::at(BUILT_IN.len() + at)
    }

    pub(super) fn as_str(self) -> &'static str {
        let at = usize::from(self.0.get()) - 1;
        match BUILT_IN.get(at) {
            Some(text) => text,
            None => NAMED.get(at - BUILT_IN.len()).and_then(OnceLock::get).map_or("", AsRef::as_ref),
        }
    }

    fn at(position: usize) -> Option<Self> {
        u8::try_from(position + 1).ok().and_then(NonZeroU8::new).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: the places are those of the process.
    #[test]
    fn a_text_is_known_after_it_was_named_while_there_is_a_place() {
        for text in BUILT_IN {
            assert_eq!(Known::find(text).map(Known::as_str), Some(text));
        }
        assert!(Known::find("text/x-unheard-of").is_none());
        let named = Known::remember("text/x-unheard-of");
        assert_eq!(named.map(Known::as_str), Some("text/x-unheard-of"));
        assert!(Known::find("text/x-unheard-of") == named);
        assert!(Known::remember("a\nb").is_none(), "every send would refuse it");

        let texts: Vec<_> = (0..NAMED.len() + 5).map(|n| format!("text/x-{n}")).collect();
        let known: Vec<_> = texts.iter().map(|text| (Known::remember(text), text)).collect();
        assert!(known.last().is_some_and(|(last, _)| last.is_none()), "every place is taken");
        for (known, text) in known {
            assert!(known.is_none_or(|known| known.as_str() == text && Known::find(text) == Some(known)));
        }
    }
}
