//! The login, which the client library never learns: at trace level it logs every frame that it writes, this one too.
//!
//! It is given a blank of the same length, and the socket writes the login in its place.

use lapin::{
    auth::AuthProvider,
    types::{LongString, ShortString},
};

/// In no text of UTF-8, and so in no other field of the frames of a login.
const BLANK: u8 = 0xff;

/// What the broker is told in answer to "who are you", as the mechanism PLAIN wants it (RFC 4616).
pub(crate) struct Login {
    answer: Vec<u8>,
    written: usize,
}

impl Login {
    pub(crate) fn new(user: &str, password: &str) -> Self {
        Self { answer: format!("\0{user}\0{password}").into_bytes(), written: 0 }
    }

    /// What is to be written now: a part of what the client library wants to write, or (`true`) of the login.
    pub(crate) fn part<'a>(&'a self, wanted: &'a [u8]) -> (&'a [u8], bool) {
        let rest = &self.answer[self.written..];
        let blank = wanted.windows(rest.len()).position(|part| part.iter().all(|byte| *byte == BLANK));
        match blank {
            Some(0) => (rest, true),
            Some(at) => (&wanted[..at], false),
            None => (wanted, false),
        }
    }

    /// So much of the login has been written; `true` when that was the last of it.
    pub(crate) fn advance(&mut self, bytes: usize) -> bool {
        self.written += bytes;
        self.written >= self.answer.len()
    }
}

/// Stands in for a login.
pub(crate) struct Blank(LongString);

impl Blank {
    pub(crate) fn of(login: &Login) -> Self {
        Self(vec![BLANK; login.answer.len()].into())
    }
}

impl AuthProvider for Blank {
    fn mechanism(&self) -> ShortString {
        "PLAIN".into()
    }

    fn auth_starter(&self) -> Result<LongString, String> {
        Ok(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_login_takes_the_place_of_the_blank_however_little_is_written_at_a_time() {
        let mut login = Login::new("us\u{e9}r", "s3cret");
        let blank = Blank::of(&login).auth_starter().expect("a blank");
        let frame = [b"before\xff\xff".as_slice(), b"|", blank.as_bytes(), b"|after"].concat();
        for at_most in [1, 3, 64] {
            login.written = 0;
            let (mut wire, mut done, mut at) = (Vec::new(), false, 0);
            while at < frame.len() {
                let (part, ours) = if done { (&frame[at..], false) } else { login.part(&frame[at..]) };
                let part = part[..part.len().min(at_most)].to_vec();
                done |= ours && login.advance(part.len());
                at += part.len();
                wire.extend(part);
            }
            assert_eq!(wire, b"before\xff\xff|\0us\xc3\xa9r\0s3cret|after", "{at_most} bytes at a time");
        }
    }
}
