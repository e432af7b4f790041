//! The subscriptions that routes add up to, checked against what the backend can do.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{AckMode, ConsumerFactory, Route};
use crate::{
    Address, Bus, Capabilities, ConsumeOptions, DeadLetters, Error, ErrorKind, FailurePolicy, Kind, Result, RetryMode,
    Start,
    delivery::can_retry,
    handler::{Service, Several, States},
    runner::Callbacks,
    serializers::Accept,
    subscription::check_options,
};

/// A handler and the messages it takes.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) kind: Option<Kind>,
    pub(crate) service: Arc<dyn Service>,
    /// After which an attempt is cancelled.
    pub(crate) timeout: Option<Duration>,
}

impl Entry {
    pub(crate) fn share(&self) -> Self {
        Self { name: self.name, kind: self.kind.clone(), service: Arc::clone(&self.service), timeout: self.timeout }
    }
}

/// A subscription to be made, with its handlers.
pub(crate) struct Plan {
    pub(crate) address: Address,
    pub(crate) options: ConsumeOptions,
    pub(crate) entries: Vec<Entry>,
    pub(crate) policy: FailurePolicy,
    pub(crate) concurrency: usize,
    pub(crate) ack_mode: AckMode,
    pub(crate) accept: Accept,
    pub(crate) states: States,
    pub(crate) callbacks: Callbacks,
    only_own_kinds: bool,
    chosen: Chosen,
}

/// What its handlers have said of it: each thing once, or alike.
#[derive(Default)]
struct Chosen {
    policy: Option<FailurePolicy>,
    accept: Option<Accept>,
    prefetch: Option<usize>,
    prefetch_bytes: Option<usize>,
    lease: Option<(Duration, Duration)>,
    start: Option<Start>,
}

impl Plan {
    pub(super) fn new(route: &Route, factory: &ConsumerFactory) -> Self {
        Self {
            address: route.address(),
            options: ConsumeOptions { group: route.group.clone(), ..ConsumeOptions::default() },
            entries: Vec::new(),
            policy: FailurePolicy::default(),
            concurrency: 1,
            ack_mode: route.ack_mode,
            accept: factory.bus.parts().accept.clone(),
            states: factory.states.clone(),
            callbacks: factory.callbacks.clone(),
            only_own_kinds: false,
            chosen: Chosen::default(),
        }
    }

    /// Adds one more handler to the subscription. Its options must not contradict those of the others.
    pub(super) fn join(&mut self, route: &Route, bus: &Bus) -> Result<()> {
        let kind = route.full_kind(bus)?;
        if let Some(other) = self.entries.iter().find(|entry| entry.kind == kind) {
            let takes = kind.as_ref().map_or_else(|| "any kind".to_owned(), ToString::to_string);
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{} and {} both handle {takes} of {}", other.name, route.name, self.address),
            )
            .with_hint("give them different kinds or versions, or use Route::also for both to see each message"));
        }
        route.check_numbers()?;
        self.choose(route)?;
        self.concurrency = self.concurrency.max(route.concurrency);
        self.options.declare &= !route.existing;
        self.only_own_kinds |= route.only_own_kinds;
        if route.ordered_by_key {
            self.options.ordered_by_key = true;
        }
        self.options.transactional |= route.transactional;
        if self.options.ordered_by_key {
            // Sending a failed message behind the others would break the order that was asked for.
            self.policy.mode = RetryMode::InPlace;
        }
        let service = if route.parts.is_empty() {
            Arc::clone(&route.service)
        } else {
            let mut parts = vec![(route.name.replace(',', ";"), Arc::clone(&route.service))];
            parts.extend(route.parts.iter().map(|(name, part)| (name.replace(',', ";"), Arc::clone(part))));
            let mut names = BTreeSet::new();
            if let Some((name, _)) = parts.iter().find(|(name, _)| name.is_empty() || !names.insert(name)) {
                // What has succeeded is remembered by its name.
                let sentence = format!("{name:?} names two handlers of {}, or nothing", self.address);
                return Err(Error::new(ErrorKind::Conflict, sentence)
                    .with_hint("give each handler of Route::also a name of its own; a comma counts as a semicolon"));
            }
            Arc::new(Several { parts, timeout: route.timeout })
        };
        let timeout = route.timeout.filter(|_| route.parts.is_empty());
        if let Some((_, state)) = service.needed_states().into_iter().find(|(id, _)| !self.states.has(*id)) {
            return Err(Error::new(
                ErrorKind::Config,
                format!("{} of {} needs a state of type {state}, and none was given", route.name, self.address),
            )
            .with_hint("call ConsumerFactory::state before the runner starts"));
        }
        self.entries.push(Entry { name: route.name, kind, service, timeout });
        Ok(())
    }

    /// What the subscription has only once, as one of its handlers asks for it.
    fn choose(&mut self, route: &Route) -> Result<()> {
        let Self { address, options, chosen, .. } = self;
        let contradicts = |what: &str| {
            Error::new(ErrorKind::Conflict, format!("the handlers of {address} ask for different {what}"))
                .with_hint("they share one subscription: say it once")
        };
        if route.ack_mode != self.ack_mode {
            return Err(contradicts("acknowledgement modes"));
        }
        let alike = |what: &str, alike: bool| if alike { Ok(()) } else { Err(contradicts(what)) };
        alike("failure policies", agree(&mut chosen.policy, &route.policy))?;
        alike("content types", agree(&mut chosen.accept, &route.accept))?;
        alike("prefetches", agree(&mut chosen.prefetch, &route.prefetch))?;
        alike("prefetches in bytes", agree(&mut chosen.prefetch_bytes, &route.prefetch_bytes))?;
        alike("leases", agree(&mut chosen.lease, &route.lease))?;
        alike("places to start at", agree(&mut chosen.start, &route.start))?;
        for (key, value) in &route.extra {
            match options.extra.iter().find(|(known, _)| known == key) {
                Some((_, other)) => alike(&format!("values of {key:?}"), other == value)?,
                None => options.extra.push((key.clone(), value.clone())),
            }
        }
        if let Some(policy) = &route.policy {
            self.policy = policy.clone();
        }
        if let Some(accept) = &route.accept {
            self.accept = accept.clone();
        }
        options.prefetch = chosen.prefetch.unwrap_or(options.prefetch);
        options.prefetch_bytes = chosen.prefetch_bytes.unwrap_or(options.prefetch_bytes);
        (options.lease, options.max_lease) = chosen.lease.unwrap_or((options.lease, options.max_lease));
        options.start = chosen.start.unwrap_or(options.start);
        Ok(())
    }

    /// As many messages are fetched as the handlers that may run at a time take.
    pub(super) fn feed(&mut self) -> Result<()> {
        let Self { options, concurrency, .. } = self;
        let Some(chosen) = self.chosen.prefetch else {
            let batch = self.entries.iter().map(|entry| entry.service.max_batch()).max().unwrap_or(1);
            options.prefetch = options.prefetch.max(concurrency.saturating_mul(batch));
            return Ok(());
        };
        // A prefetch of 0 is refused as such.
        if chosen == 0 || chosen >= *concurrency {
            return Ok(());
        }
        let sentence =
            format!("a prefetch of {chosen} with a concurrency of {concurrency}: fewer handlers could ever run");
        Err(Error::new(ErrorKind::Config, sentence)
            .with_operation("start")
            .with_channel(self.address.name())
            .with_hint("make the prefetch at least as large as the concurrency, or leave it out"))
    }

    /// Asks the broker for no other kinds, where a handler wants that.
    pub(super) fn filter(&mut self) -> Result<()> {
        if !self.only_own_kinds {
            return Ok(());
        }
        let name_of = |entry: &Entry| entry.kind.as_ref().map(|kind| kind.name.to_string());
        let kinds: Option<BTreeSet<String>> = self.entries.iter().map(name_of).collect();
        let kinds = kinds.ok_or_else(|| {
            Error::new(ErrorKind::Config, "only_own_kinds, and a handler that takes any kind")
                .with_operation("start")
                .with_channel(self.address.name())
                .with_hint("derive Message for its argument, or call kind")
        })?;
        self.options.kinds = kinds.into_iter().collect();
        Ok(())
    }

    pub(super) fn check(&self, bus: &Bus) -> Result<()> {
        let (backend, capabilities) = (bus.backend(), bus.capabilities());
        bus.parts().check_address(&self.address)?;
        self.policy.check(&self.address)?;
        if let Some(letters) = self.dead_letters(bus) {
            bus.parts().check_dead_letters(&self.address, &letters).map_err(|error| error.with_operation("start"))?;
        }
        check_options(backend, capabilities, &self.address, &self.options)?;
        if self.options.transactional && self.ack_mode != AckMode::AfterSuccess {
            return Err(Error::new(ErrorKind::Config, "a transaction acknowledges when the handler has succeeded")
                .with_operation("start")
                .with_channel(self.address.name())
                .with_hint("leave its acknowledgement mode as it is"));
        }
        bus.parts().serializers.check(&self.accept)?;
        self.check_retries(backend, capabilities)
            .map_err(|error| error.with_operation("start").with_channel(self.address.name()))
    }

    /// The queue for its dead letters; `None` where the sender is told and keeps them.
    pub(crate) fn dead_letters(&self, bus: &Bus) -> Option<Address> {
        let told_to_sender = bus.capabilities().direct && self.policy.dead_letters == DeadLetters::Own;
        (!told_to_sender).then(|| self.policy.dead_letter_address(&self.address, self.options.group.as_deref()))
    }

    fn check_retries(&self, backend: &'static str, capabilities: &Capabilities) -> Result<()> {
        if self.policy.mode == RetryMode::InPlace || self.policy.max_attempts == 1 {
            return Ok(());
        }
        can_retry(backend, capabilities, self.policy.backoff.max)
            .map_err(|error| error.with_hint("retry in place, or shorten backoff.max"))
    }

    /// The name under which it is paused, resumed and counted.
    pub(crate) fn name(&self) -> String {
        match &self.options.group {
            Some(group) => format!("{}@{group}", self.address.name()),
            None => self.address.name().to_owned(),
        }
    }
}

/// Whether nobody has said something else; it is remembered.
fn agree<T: Clone + PartialEq>(chosen: &mut Option<T>, said: &Option<T>) -> bool {
    match (&*chosen, said) {
        (Some(chosen), Some(said)) => chosen == said,
        (None, said) => {
            chosen.clone_from(said);
            true
        }
        (Some(_), None) => true,
    }
}
