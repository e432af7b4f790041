//! Settings: one map of texts, however they came in, read into one serde struct by each backend.
//!
//! Order of precedence, weakest first: file, environment, query of the URL, code.

mod address;
mod environment;
mod redact;
mod settings;
mod values;

pub use address::{is_loopback, percent_decoded};
pub use environment::Environment;
pub use redact::{Secret, redact_url};
pub use settings::{Origin, Settings};
pub use values::duration;

/// The known name that the user most likely meant.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let score = |other: &str| strsim::damerau_levenshtein(&name.to_ascii_lowercase(), &other.to_ascii_lowercase());
    known
        .map(|other| (score(other), other))
        .filter(|(score, other)| *score <= 1 + other.len() / 4)
        .min()
        .map(|(_, other)| other)
}

/// Whether a name is the other one but for one letter, or two that changed places.
pub(crate) fn is_slip_of(name: &str, other: &str) -> bool {
    strsim::damerau_levenshtein(name, other) == 1
}
