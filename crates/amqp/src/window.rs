//! Which acknowledgements may be told to the broker: a state machine without any connection.

use std::collections::VecDeque;

/// Which deliveries of a channel are finished, and what may be told to the broker about them.
///
/// Holds only deliveries that the broker still counts as ours, so its size is bounded by the prefetch window, however
/// long one handler is stuck.
#[derive(Debug, Default)]
pub(crate) struct AckWindow {
    /// Unsettled deliveries in the order of their tags; the front one is never finished.
    open: VecDeque<(u64, Slot)>,
    /// The last of the finished deliveries in front of `open`, and how many they are.
    prefix: Option<u64>,
    in_prefix: usize,
    /// Finished deliveries in `open`: behind an unfinished one.
    behind: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Open,
    /// Finished behind an unfinished one.
    Done,
    /// So for a whole tick: whatever is in front takes its time.
    Aged,
}

/// One acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) tag: u64,
    /// With every unsettled delivery before it.
    pub(crate) multiple: bool,
}

impl AckWindow {
    /// A delivery arrived. Tags of a channel only grow.
    pub(crate) fn delivered(&mut self, tag: u64) {
        self.open.push_back((tag, Slot::Open));
    }

    /// A delivery is finished; `false` when it is not ours.
    pub(crate) fn done(&mut self, tag: u64) -> bool {
        let Some(at) = self.find_open(tag) else { return false };
        self.open[at].1 = Slot::Done;
        self.behind += 1;
        self.sweep();
        true
    }

    /// A delivery goes back to the broker by a frame of its own; `false` when it is not ours.
    pub(crate) fn returned(&mut self, tag: u64) -> bool {
        let Some(at) = self.find_open(tag) else { return false };
        self.open.remove(at);
        self.sweep();
        true
    }

    /// Whether a delivery is ours and not finished.
    pub(crate) fn is_open(&self, tag: u64) -> bool {
        self.find_open(tag).is_some()
    }

    fn find_open(&self, tag: u64) -> Option<usize> {
        // Deliveries are mostly finished in their order.
        let at = match self.open.front() {
            Some((front, _)) if *front == tag => 0,
            _ => self.open.binary_search_by_key(&tag, |(tag, _)| *tag).ok()?,
        };
        (self.open[at].1 == Slot::Open).then_some(at)
    }

    fn sweep(&mut self) {
        while let Some((tag, Slot::Done | Slot::Aged)) = self.open.front() {
            self.prefix = Some(*tag);
            self.in_prefix += 1;
            self.behind -= 1;
            self.open.pop_front();
        }
    }

    /// What to tell now: everything before the first unfinished delivery, with one frame. What is finished behind it
    /// gets frames of its own when it has waited for a whole tick, or at once with `all`; until then a gap usually closes.
    pub(crate) fn flush(&mut self, tick: bool, all: bool) -> Vec<Ack> {
        let mut acks = Vec::new();
        // The tag itself is always unsettled at the broker, as it demands; some before it may be settled already.
        acks.extend(self.prefix.take().map(|tag| Ack { tag, multiple: true }));
        self.in_prefix = 0;
        if self.behind > 0 && (tick || all) {
            self.open.retain_mut(|(tag, slot)| match slot {
                Slot::Open => true,
                Slot::Done if !all => {
                    *slot = Slot::Aged;
                    true
                }
                Slot::Done | Slot::Aged => {
                    acks.push(Ack { tag: *tag, multiple: false });
                    false
                }
            });
            self.behind = self.open.iter().filter(|(_, slot)| *slot != Slot::Open).count();
        }
        acks
    }

    /// Finished and not yet told.
    pub(crate) fn pending(&self) -> usize {
        self.in_prefix + self.behind
    }

    /// Whether one frame would tell of several deliveries, or of the oldest.
    pub(crate) fn has_prefix(&self) -> bool {
        self.prefix.is_some()
    }

    /// Nothing is unsettled.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.in_prefix == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acks(pairs: &[(u64, bool)]) -> Vec<Ack> {
        pairs.iter().map(|(tag, multiple)| Ack { tag: *tag, multiple: *multiple }).collect()
    }

    fn window(tags: u64) -> AckWindow {
        let mut window = AckWindow::default();
        (1..=tags).for_each(|tag| window.delivered(tag));
        window
    }

    #[test]
    fn what_is_finished_in_order_takes_one_frame() {
        let mut window = window(4);
        assert!(window.done(1) && window.done(2) && window.done(3));
        assert_eq!((window.pending(), window.flush(false, false)), (3, acks(&[(3, true)])));
        assert_eq!((window.pending(), window.flush(true, true)), (0, acks(&[])));
        assert!(!window.done(3) && !window.is_empty());
        assert!(window.done(4) && !window.is_empty());
        window.flush(false, false);
        assert!(window.is_empty());
    }

    #[test]
    fn a_gap_is_waited_for_one_tick_and_then_passed_by() {
        let mut window = window(4);
        assert!(window.done(2) && window.done(3));
        assert_eq!(window.flush(true, false), []);
        assert!(window.done(4));
        assert_eq!(window.flush(true, false), acks(&[(2, false), (3, false)]));
        assert_eq!(window.pending(), 1);
        assert!(window.done(1));
        assert_eq!(window.flush(false, false), acks(&[(4, true)]));
        assert!(window.is_empty());
    }

    #[test]
    fn a_returned_delivery_closes_the_gap() {
        let mut window = window(3);
        assert!(window.done(2) && window.returned(1) && !window.returned(1) && !window.returned(2));
        assert_eq!(window.flush(false, false), acks(&[(2, true)]));
    }

    /// Any order of finishing, returning and flushing: what the broker is told never covers an unfinished delivery,
    /// names no tag twice, and in the end covers every finished one.
    #[test]
    fn an_unfinished_delivery_is_never_covered() {
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..2_000 {
            let mut window = AckWindow::default();
            // What the broker holds unsettled, and whether it is finished.
            let mut broker = std::collections::BTreeMap::new();
            let mut next = 1;
            let tell = |broker: &mut std::collections::BTreeMap<u64, bool>, told: Vec<Ack>| {
                for ack in told {
                    assert!(broker.contains_key(&ack.tag), "round {round}: {ack:?} is settled already");
                    let covered: Vec<u64> = if ack.multiple {
                        broker.range(..=ack.tag).map(|(tag, _)| *tag).collect()
                    } else {
                        vec![ack.tag]
                    };
                    for tag in covered {
                        assert_eq!(broker.remove(&tag), Some(true), "round {round}: {ack:?} covers {tag}");
                    }
                }
            };
            for _ in 0..random.usize(1..60) {
                let pick = |random: &mut fastrand::Rng| random.u64(1..next + 1);
                match random.u8(0..8) {
                    0..3 => {
                        window.delivered(next);
                        broker.insert(next, false);
                        next += 1;
                    }
                    3..6 => {
                        let tag = pick(&mut random);
                        let expected = broker.get(&tag) == Some(&false);
                        assert_eq!(window.done(tag), expected);
                        broker.entry(tag).and_modify(|done| *done = true);
                    }
                    6 => {
                        let tag = pick(&mut random);
                        let expected = broker.get(&tag) == Some(&false);
                        assert_eq!(window.returned(tag), expected);
                        if expected {
                            broker.remove(&tag);
                        }
                    }
                    _ => tell(&mut broker, window.flush(random.bool(), random.bool())),
                }
                let unfinished = broker.values().filter(|done| !**done).count();
                assert_eq!(window.pending(), broker.len() - unfinished);
                assert!(window.open.len() <= broker.len());
            }
            tell(&mut broker, window.flush(true, true));
            assert!(broker.values().all(|done| !done));
            assert_eq!(window.is_empty(), broker.is_empty());
        }
    }
}
