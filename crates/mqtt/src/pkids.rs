//! A set of packet ids.

/// Packet ids as bits; as large as the largest id that it has seen.
#[derive(Debug, Default, Clone)]
pub(crate) struct Pkids {
    words: Vec<u64>,
    count: usize,
}

impl Pkids {
    fn place(pkid: u16) -> (usize, u64) {
        (usize::from(pkid) / 64, 1 << (pkid % 64))
    }

    /// Whether it was not there before.
    pub(crate) fn insert(&mut self, pkid: u16) -> bool {
        let (at, bit) = Self::place(pkid);
        if self.words.len() <= at {
            self.words.resize(at + 1, 0);
        }
        let new = self.words[at] & bit == 0;
        self.words[at] |= bit;
        self.count += usize::from(new);
        new
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, pkid: u16) -> bool {
        let (at, bit) = Self::place(pkid);
        let Some(word) = self.words.get_mut(at).filter(|word| **word & bit != 0) else { return false };
        *word &= !bit;
        self.count -= 1;
        true
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u16> {
        let bits = |word: u64| (0..64).filter(move |bit| word & (1 << bit) != 0);
        self.words
            .iter()
            .enumerate()
            .flat_map(move |(at, word)| bits(*word).map(move |bit| (at * 64) as u16 + bit as u16))
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_there_once() {
        let mut set = Pkids::default();
        assert!(set.insert(1) && set.insert(64) && set.insert(65_535) && !set.insert(64));
        assert_eq!(set.len(), 3);
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 64, 65_535]);
        assert!(set.remove(64) && !set.remove(64) && !set.remove(2));
        set.clear();
        assert!(set.len() == 0 && !set.remove(1));
    }
}
