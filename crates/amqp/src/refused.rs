//! What it means for each unconfirmed message that the broker has refused one of them, and ended their channel over it.

use polymq_core::ErrorKind;

use crate::{
    error::{self, Stage},
    inflight::Entry,
};

/// What has become of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// This is the one, and it would be refused again.
    Refused,
    /// It may be the one, or may have been accepted before.
    Suspect,
    /// Written before the one that was refused: accepted, as far as anybody knows.
    Unknown,
    /// Certainly not accepted, and not known to be at fault: it may be written again.
    Unread,
}

/// The fates of what was written, in the order of writing.
///
/// The broker says what it refuses, but not which message that was. It is one of those that its words can be about, and
/// whatever came after it was not looked at: of a channel that is ended, nothing more is read.
pub(crate) fn fates(error: &lapin::Error, entries: &[Entry]) -> Vec<Fate> {
    let kind = error::kind(error, Stage::Operation);
    let text = error::text(error);
    let blamed: Vec<bool> = entries.iter().map(|entry| can_be_about(kind, &text, entry)).collect();
    judge(&blamed, kind == ErrorKind::TooLarge)
}

/// `alike`: what one is refused for, all that are blamed would be, so the first of them is the one.
fn judge(blamed: &[bool], alike: bool) -> Vec<Fate> {
    let first = blamed.iter().position(|blamed| *blamed).unwrap_or(blamed.len());
    let last = blamed.iter().rposition(|blamed| *blamed).unwrap_or(blamed.len());
    let certain = alike || first == last;
    let unread_from = if certain { first } else { last };
    let fate = |(at, blamed): (usize, &bool)| match blamed {
        true if certain => Fate::Refused,
        _ if at >= unread_from => Fate::Unread,
        true => Fate::Suspect,
        false => Fate::Unknown,
    };
    blamed.iter().enumerate().map(fate).collect()
}

fn can_be_about(kind: ErrorKind, text: &str, entry: &Entry) -> bool {
    match kind {
        ErrorKind::TooLarge => text.contains(&format!("size {} ", entry.outgoing.message.payload().len())),
        // "no exchange 'x' in vhost", "access to exchange 'x' in vhost".
        ErrorKind::NotFound | ErrorKind::PermissionDenied => {
            let exchange = match entry.place().0 {
                "" => "amq.default",
                named => named,
            };
            text.contains(&format!("'{exchange}'"))
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::{Fate::*, *};

    #[test]
    fn only_what_is_certain_is_said() {
        let (no, yes) = (false, true);
        for (blamed, alike, expected) in [
            (vec![], no, vec![]),
            // Nothing tells which one it was, so nothing is certain about any.
            (vec![no, no], no, vec![Unknown, Unknown]),
            (vec![yes], no, vec![Refused]),
            (vec![no, yes, no], no, vec![Unknown, Refused, Unread]),
            (vec![no, yes, no, yes, no], no, vec![Unknown, Suspect, Unknown, Unread, Unread]),
            (vec![no, yes, no, yes, no], yes, vec![Unknown, Refused, Unread, Refused, Unread]),
        ] {
            assert_eq!(judge(&blamed, alike), expected, "{blamed:?}");
        }
    }
}
