use std::io;

use bytes::Bytes;

/// Where a body is written before its size is known.
///
/// Most messages are small: they are written on the stack, and the only allocation of an encode is the exact
/// one of the result. Larger ones move to a `Vec` that becomes the result without a copy.
pub(crate) struct Scratch {
    inline: [u8; Self::INLINE],
    used: usize,
    spilled: Vec<u8>,
}

impl Scratch {
    /// Bytes kept on the stack: larger costs clearing on every encode, smaller sends usual messages to the
    /// heap.
    const INLINE: usize = 256;

    #[inline]
    pub(crate) fn new() -> Self {
        Self { inline: [0; Self::INLINE], used: 0, spilled: Vec::new() }
    }

    /// The body, with no byte of it copied again if it is large.
    #[inline]
    pub(crate) fn finish(self) -> Bytes {
        if self.spilled.is_empty() {
            Bytes::copy_from_slice(self.inline.get(..self.used).unwrap_or_default())
        } else {
            Bytes::from(self.spilled)
        }
    }

    #[inline(always)]
    fn push(&mut self, bytes: &[u8]) {
        let end = self.used + bytes.len();
        match self.inline.get_mut(self.used..end) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.used = end;
            }
            None => {
                if self.spilled.is_empty() {
                    self.spill(bytes.len());
                }
                self.spilled.extend_from_slice(bytes);
            }
        }
    }

    #[cold]
    fn spill(&mut self, more: usize) {
        self.spilled.reserve((self.used + more).max(4 * Self::INLINE));
        self.spilled.extend_from_slice(self.inline.get(..self.used).unwrap_or_default());
        // Full from now on, so that what follows goes to the `Vec` too.
        self.used = Self::INLINE;
    }
}

impl io::Write for Scratch {
    #[inline(always)]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    #[inline(always)]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.push(bytes);
        Ok(())
    }

    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
