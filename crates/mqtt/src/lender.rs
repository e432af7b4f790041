//! What is known of one connection that brings messages.

use tokio::time::Instant;

use crate::{link::Link, pkids::Pkids};

/// A connection that brings messages, and what the broker waits for us to acknowledge.
#[derive(Debug)]
pub(crate) struct Lender {
    pub(crate) link: Option<Link>,
    /// Whose events count: those of a link that was replaced do not.
    pub(crate) serial: u32,
    /// Of the present connection; zero without one.
    pub(crate) generation: u32,
    /// The last generation that there was.
    last_generation: u32,
    /// Tokens of this generation and later ones are good.
    good_from: u32,
    /// Whether this connection is subscribed, so that what is sent now arrives.
    pub(crate) subscribed: bool,
    /// When a message came last.
    pub(crate) last: Instant,
    lent: Pkids,
    /// While one connection gives way to another that resumes its session: what was settled meanwhile.
    handover: Option<Pkids>,
    /// After that: what the broker delivers again although we have it.
    expected: Pkids,
}

impl Lender {
    pub(crate) fn new() -> Self {
        Self {
            link: None,
            serial: 0,
            generation: 0,
            last_generation: 0,
            good_from: 0,
            subscribed: false,
            last: Instant::now(),
            lent: Pkids::default(),
            handover: None,
            expected: Pkids::default(),
        }
    }

    /// Messages that wait to be acknowledged, in our hands or in a consumer's.
    pub(crate) fn lent(&self) -> usize {
        self.lent.len()
    }

    /// Whether a delivery of this generation can still be acknowledged.
    pub(crate) fn knows(&self, generation: u32) -> bool {
        (self.generation > 0 || self.handover.is_some()) && generation >= self.good_from
    }

    /// Begins to replace the connection by another one of the same session, without giving up what is in flight: the
    /// session keeps its packet ids (section 4.4), so that old deliveries can be acknowledged over the new connection.
    /// Gives the generation after which the new one counts; `None` when there is no connection.
    pub(crate) fn hand_over(&mut self) -> Option<u32> {
        if self.generation == 0 {
            return None;
        }
        self.handover = Some(Pkids::default());
        self.serial += 1;
        // What still arrives over the old connection is delivered again over the new one.
        self.generation = 0;
        Some(self.last_generation)
    }

    /// A connection is made. `false`: what the former one brought comes again.
    pub(crate) fn connected(&mut self, generation: u32, session_present: bool) -> bool {
        (self.generation, self.last_generation, self.last) = (generation, generation, Instant::now());
        self.expected.clear();
        let Some(settled) = self.handover.take().filter(|_| session_present) else {
            self.good_from = generation;
            self.lent.clear();
            return false;
        };
        self.expected = self.lent.clone();
        for pkid in settled.iter() {
            self.expected.insert(pkid);
            self.write_ack(pkid);
        }
        true
    }

    /// A message arrived; `false` when we have it already.
    pub(crate) fn arrived(&mut self, pkid: u16, dup: bool) -> bool {
        self.last = Instant::now();
        if dup && self.expected.remove(pkid) {
            return false;
        }
        if pkid > 0 {
            self.lent.insert(pkid);
        }
        true
    }

    pub(crate) fn ack(&mut self, pkid: u16) {
        if !self.lent.remove(pkid) {
            return;
        }
        match &mut self.handover {
            Some(settled) => {
                settled.insert(pkid);
            }
            None => self.write_ack(pkid),
        }
    }

    fn write_ack(&self, pkid: u16) {
        if let Some(link) = &self.link {
            link.ack(self.generation, pkid);
        }
    }

    /// The connection ended.
    pub(crate) fn lost(&mut self) {
        self.generation = 0;
        self.subscribed = false;
        self.handover = None;
        self.lent.clear();
        self.expected.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_ends_its_tokens() {
        let mut lender = Lender::new();
        assert!(!lender.connected(1, true));
        assert!(lender.arrived(7, false) && lender.knows(1));
        lender.lost();
        assert!(!lender.knows(1) && lender.lent() == 0);
        lender.connected(2, true);
        assert!(lender.arrived(7, true), "the broker delivers it again");
        assert!(!lender.knows(1) && lender.knows(2));
    }

    #[test]
    fn a_handover_keeps_what_is_in_flight() {
        let mut lender = Lender::new();
        lender.connected(1, false);
        assert!(lender.arrived(1, false) && lender.arrived(2, false) && lender.arrived(3, false));
        lender.ack(1);
        assert_eq!(lender.hand_over(), Some(1));
        lender.ack(2);
        assert!(lender.knows(1));
        assert!(lender.connected(2, true) && lender.knows(1));
        assert_eq!(lender.lent(), 1);
        assert!(!lender.arrived(2, true) && !lender.arrived(3, true), "both are known");
        assert!(lender.arrived(1, false), "a new message under an old id");
        lender.ack(3);
        assert_eq!(lender.lent(), 1);
    }

    #[test]
    fn a_handover_to_a_new_session_ends_the_tokens() {
        let mut lender = Lender::new();
        assert_eq!(lender.hand_over(), None, "not connected");
        lender.connected(1, true);
        lender.arrived(1, false);
        assert_eq!(lender.hand_over(), Some(1));
        assert!(!lender.connected(2, false));
        assert!(!lender.knows(1) && lender.lent() == 0);
    }
}
