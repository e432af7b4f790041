//! Copies of the bodies of records, which the client library takes back.

use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};

use crate::link::lock;

/// Bodies up to this size share memory: an allocation for each, which another thread frees, costs more than the copy.
const SMALL: usize = 1024;
/// What they share. Who keeps one small message for long keeps no more than this.
const SHARED: usize = 8 * 1024;
/// Memory of larger bodies up to this size is used again: what one thread allocates and another one frees goes back to the
/// system, and getting it anew costs more than the copy.
const LARGE: usize = 128 * 1024;
/// How much of that lies about at most.
const SPARE: usize = 1024 * 1024;

/// Memory for the next bodies.
#[derive(Debug, Default)]
pub(crate) struct Bodies {
    small: BytesMut,
    spare: Arc<Mutex<Spare>>,
}

#[derive(Debug, Default)]
struct Spare {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// A body whose memory is used again when nobody has it any more.
struct Large {
    body: Vec<u8>,
    spare: Arc<Mutex<Spare>>,
}

impl Bodies {
    /// A copy of a body.
    pub(crate) fn keep(&mut self, body: &[u8]) -> Bytes {
        match body.len() {
            0 => Bytes::new(),
            1..=SMALL => {
                if self.small.capacity() < body.len() {
                    self.small = BytesMut::with_capacity(SHARED);
                }
                self.small.extend_from_slice(body);
                self.small.split().freeze()
            }
            len @ ..=LARGE => {
                let mut copy = lock(&self.spare).take(len);
                copy.extend_from_slice(body);
                Bytes::from_owner(Large { body: copy, spare: Arc::clone(&self.spare) })
            }
            _ => Bytes::copy_from_slice(body),
        }
    }
}

impl Spare {
    /// Room for a body, of which no more than half is left over.
    fn take(&mut self, len: usize) -> Vec<u8> {
        match self.buffers.pop() {
            Some(buffer) => {
                self.bytes -= buffer.capacity();
                if (len..=2 * len).contains(&buffer.capacity()) { buffer } else { Vec::with_capacity(len) }
            }
            None => Vec::with_capacity(len),
        }
    }

    fn give(&mut self, mut buffer: Vec<u8>) {
        if self.bytes + buffer.capacity() <= SPARE {
            buffer.clear();
            self.bytes += buffer.capacity();
            self.buffers.push(buffer);
        }
    }
}

impl AsRef<[u8]> for Large {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

impl Drop for Large {
    fn drop(&mut self) {
        lock(&self.spare).give(std::mem::take(&mut self.body));
    }
}

/// The same body in memory of its own, for a message that waits for long.
pub(crate) fn alone(body: &Bytes) -> Option<Bytes> {
    (body.len() <= SMALL).then(|| Bytes::copy_from_slice(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_of_any_size_are_what_they_were() {
        let mut bodies = Bodies::default();
        let sizes = [0, 1, 255, SMALL, SMALL + 1, SHARED, 3 * SHARED, LARGE, LARGE + 1].into_iter().cycle().take(500);
        let sent: Vec<Vec<u8>> = sizes.enumerate().map(|(at, size)| vec![at as u8; size]).collect();
        let mut kept: Vec<Bytes> = sent.iter().map(|body| bodies.keep(body)).collect();
        assert!(kept.iter().zip(&sent).all(|(kept, sent)| kept == sent));
        // What others had does not show.
        kept.truncate(250);
        let again: Vec<Bytes> = sent.iter().rev().map(|body| bodies.keep(body)).collect();
        assert!(kept.iter().zip(&sent).chain(again.iter().rev().zip(&sent)).all(|(kept, sent)| kept == sent));
    }

    #[test]
    fn small_bodies_share_memory_and_large_ones_do_not() {
        let mut bodies = Bodies::default();
        let follows = |first: &Bytes, second: &Bytes| first.as_ptr().wrapping_add(first.len()) == second.as_ptr();
        assert!(follows(&bodies.keep(&[1; 100]), &bodies.keep(&[2; 100])));
        assert!(alone(&bodies.keep(&[3; SMALL + 1])).is_none());
        assert!(alone(&bodies.keep(&[4; 100])).is_some_and(|body| body == [4; 100][..] && body.is_unique()));
    }

    #[test]
    fn memory_of_large_bodies_is_used_again_up_to_a_bound() {
        let mut bodies = Bodies::default();
        let first = bodies.keep(&[1; 16_000]);
        let at = first.as_ptr();
        drop(first);
        let second = bodies.keep(&[2; 10_000]);
        assert_eq!(second.as_ptr(), at, "the same memory");
        drop(second);
        assert_eq!(lock(&bodies.spare).take(2000).capacity(), 2000, "a small one does not hold a large one's memory");
        let many: Vec<Bytes> = (0..100).map(|_| bodies.keep(&[4; LARGE])).collect();
        drop(many);
        let spare = lock(&bodies.spare);
        let held: usize = spare.buffers.iter().map(Vec::capacity).sum();
        assert!(held == spare.bytes && (1..=SPARE).contains(&held), "{held}");
    }
}
