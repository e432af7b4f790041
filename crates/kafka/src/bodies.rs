//! Copies of the bodies of records, which the client library takes back.

use bytes::{Bytes, BytesMut};

/// Bodies up to this size share memory: an allocation for each, which another thread frees, costs more than the copy.
const SMALL: usize = 1024;
/// What they share. Who keeps one small message for long keeps no more than this.
const SHARED: usize = 8 * 1024;

/// Memory for the next bodies.
#[derive(Debug, Default)]
pub(crate) struct Bodies(BytesMut);

impl Bodies {
    /// A copy of a body.
    pub(crate) fn keep(&mut self, body: &[u8]) -> Bytes {
        if body.is_empty() || body.len() > SMALL {
            return Bytes::copy_from_slice(body);
        }
        if self.0.capacity() < body.len() {
            self.0 = BytesMut::with_capacity(SHARED);
        }
        self.0.extend_from_slice(body);
        self.0.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_of_any_size_are_what_they_were() {
        let mut bodies = Bodies::default();
        let sizes = [0, 1, 255, SMALL, SMALL + 1, SHARED, 3 * SHARED].into_iter().cycle().take(500);
        let sent: Vec<Vec<u8>> = sizes.enumerate().map(|(at, size)| vec![at as u8; size]).collect();
        let kept: Vec<Bytes> = sent.iter().map(|body| bodies.keep(body)).collect();
        assert!(kept.iter().zip(&sent).all(|(kept, sent)| kept == sent));
    }

    #[test]
    fn small_bodies_share_memory_and_large_ones_do_not() {
        let mut bodies = Bodies::default();
        let follows = |first: &Bytes, second: &Bytes| first.as_ptr().wrapping_add(first.len()) == second.as_ptr();
        assert!(follows(&bodies.keep(&[1; 100]), &bodies.keep(&[2; 100])));
        let large = bodies.keep(&[3; SMALL + 1]);
        assert!(large.is_unique());
    }
}
