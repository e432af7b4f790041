//! What must have arrived, counted strictly: a duplicate is as wrong as a loss.

use std::collections::BTreeMap;

/// Counts what was sent and what was seen, by a text that names each message.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    sent: BTreeMap<String, usize>,
    seen: BTreeMap<String, usize>,
}

impl Ledger {
    /// A ledger in which these were sent.
    pub fn sent(names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let mut ledger = Self::default();
        names.into_iter().for_each(|name| ledger.send(name));
        ledger
    }

    /// One more was sent.
    pub fn send(&mut self, name: impl Into<String>) {
        *self.sent.entry(name.into()).or_default() += 1;
    }

    /// One more was seen.
    pub fn see(&mut self, name: impl Into<String>) {
        *self.seen.entry(name.into()).or_default() += 1;
    }

    /// Those that were sent and not seen.
    #[must_use]
    pub fn missing(&self) -> Vec<&str> {
        let lacks = |(name, count): &(&String, &usize)| self.seen.get(*name).copied().unwrap_or(0) < **count;
        self.sent.iter().filter(lacks).map(|(name, _)| name.as_str()).collect()
    }

    /// Those that were seen more often than they were sent, with the surplus.
    #[must_use]
    pub fn surplus(&self) -> Vec<(&str, usize)> {
        let extra =
            |(name, count): (&'_ String, &usize)| count.saturating_sub(self.sent.get(name).copied().unwrap_or(0));
        let named = self.seen.iter().map(|(name, count)| (name.as_str(), extra((name, count))));
        named.filter(|(_, extra)| *extra > 0).collect()
    }

    /// Whether everything that was sent was seen.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing().is_empty()
    }

    /// Surplus sightings per message sent.
    #[must_use]
    pub fn duplicate_ratio(&self) -> f64 {
        let surplus: usize = self.surplus().iter().map(|(_, extra)| extra).sum();
        let sent: usize = self.sent.values().sum();
        surplus as f64 / sent.max(1) as f64
    }

    /// Everything once: nothing lost, nothing twice, nothing foreign.
    ///
    /// # Panics
    /// Otherwise, naming some of what is wrong.
    #[track_caller]
    pub fn assert_exact(&self) {
        self.assert_nothing_lost();
        let surplus = self.surplus();
        let ratio = self.duplicate_ratio();
        assert!(
            surplus.is_empty(),
            "{} seen too often in a run without faults (duplicate ratio {ratio:.4}), such as {:?}",
            surplus.len(),
            &surplus[..surplus.len().min(5)]
        );
    }

    /// Everything at least once; for runs with faults.
    ///
    /// # Panics
    /// Otherwise, naming some of what is lost.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        let missing = self.missing();
        let sent: usize = self.sent.values().sum();
        assert!(missing.is_empty(), "{} of {sent} lost, such as {:?}", missing.len(), &missing[..missing.len().min(5)]);
    }
}
