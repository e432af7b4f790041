//! One handler on one channel, with what it asks for.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    Address, Bus, Error, ErrorKind, FailurePolicy, Handler, Kind, Result, Start, Text,
    handler::{FunctionService, Service},
    serializers::Accept,
};

/// When a message is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AckMode {
    /// After its handler succeeded. The default: nothing is lost.
    #[default]
    AfterSuccess,
    /// Before its handler is called: at most once, a failure is only reported.
    OnReceipt,
    /// After its handler was called, whether it succeeded or not: a failure is only reported.
    Always,
}

/// One handler on one channel, with its options.
pub struct Route {
    pub(super) channel: Arc<str>,
    pub(super) topic: bool,
    pub(super) group: Option<String>,
    pub(super) name: &'static str,
    pub(super) service: Arc<dyn Service>,
    pub(super) parts: Vec<(String, Arc<dyn Service>)>,
    pub(super) kind: Option<Kind>,
    pub(super) version: Option<u32>,
    pub(super) concurrency: usize,
    pub(super) ordered_by_key: bool,
    pub(super) transactional: bool,
    pub(super) only_own_kinds: bool,
    pub(super) policy: Option<FailurePolicy>,
    pub(super) timeout: Option<Duration>,
    pub(super) ack_mode: AckMode,
    pub(super) accept: Option<Accept>,
    pub(super) prefetch: Option<usize>,
    pub(super) prefetch_bytes: Option<usize>,
    pub(super) lease: Option<(Duration, Duration)>,
    pub(super) start: Option<Start>,
    pub(super) existing: bool,
    pub(super) extra: Vec<(String, String)>,
}

impl Route {
    pub(super) fn new(channel: Arc<str>, name: &'static str, service: Arc<dyn Service>) -> Self {
        Self {
            channel,
            topic: false,
            group: None,
            name,
            service,
            parts: Vec::new(),
            kind: None,
            version: None,
            concurrency: 1,
            ordered_by_key: false,
            transactional: false,
            only_own_kinds: false,
            policy: None,
            timeout: None,
            ack_mode: AckMode::default(),
            accept: None,
            prefetch: None,
            prefetch_bytes: None,
            lease: None,
            start: None,
            existing: false,
            extra: Vec::new(),
        }
    }

    pub(super) fn address(&self) -> Address {
        if self.topic { Address::topic(Arc::clone(&self.channel)) } else { Address::queue(Arc::clone(&self.channel)) }
    }

    /// Consumes a topic as a member of this group.
    pub fn group(&mut self, group: impl Into<String>) -> &mut Self {
        self.topic = true;
        self.group = Some(group.into());
        self
    }

    /// Consumes a topic with a subscription of its own, which ends with the process.
    pub fn broadcast(&mut self) -> &mut Self {
        self.topic = true;
        self.group = None;
        self
    }

    /// Takes only messages of this kind, instead of the kind bound to the type of the body.
    pub fn kind(&mut self, name: impl Into<Text>) -> &mut Self {
        self.kind = Some(Kind { name: name.into(), version: None });
        self
    }

    /// The group gets only the kinds that its handlers take; others that are sent to the topic are not for it. (Without this,
    /// a kind that nobody takes is a dead letter.)
    pub fn only_own_kinds(&mut self) -> &mut Self {
        self.only_own_kinds = true;
        self
    }

    /// Takes only messages of this schema version.
    pub fn version(&mut self, version: u32) -> &mut Self {
        self.version = Some(version);
        self
    }

    /// Adds a second handler for the same messages under a name of its own. Each has its own success: when one
    /// fails, or its [`timeout`](Self::timeout) passes, only that one is called again. The name is stored with the message, so it
    /// must stay the same.
    pub fn also<Args: 'static>(&mut self, name: impl Into<String>, handler: impl Handler<Args>) -> &mut Self {
        self.parts.push((name.into(), Arc::new(FunctionService::new(handler))));
        self
    }

    /// The most handlers of this channel that run at a time; 1 without it.
    pub fn concurrency(&mut self, limit: usize) -> &mut Self {
        self.concurrency = limit;
        self
    }

    /// Handles messages of one key one after the other and retries them in place, so that their order holds.
    pub fn ordered_by_key(&mut self) -> &mut Self {
        self.ordered_by_key = true;
        self
    }

    /// What the handler sends by what it returns ([`Sends`](crate::Sends)) and the acknowledgement of its message are one:
    /// both happen or neither does, whatever fails in between. For backends that declare transactions.
    pub fn transactional(&mut self) -> &mut Self {
        self.transactional = true;
        self
    }

    /// What happens to messages that are not handled.
    pub fn policy(&mut self, policy: FailurePolicy) -> &mut Self {
        self.policy = Some(policy);
        self
    }

    /// Cancels an attempt that takes longer; it counts as failed. With [`also`](Self::also) each handler has that time. Without it
    /// an attempt may take for ever.
    pub fn timeout(&mut self, limit: Duration) -> &mut Self {
        self.timeout = Some(limit);
        self
    }

    /// When messages are acknowledged.
    pub fn ack_mode(&mut self, mode: AckMode) -> &mut Self {
        self.ack_mode = mode;
        self
    }

    /// The content types that this channel decodes, instead of the bus's.
    pub fn accept(&mut self, accept: Accept) -> &mut Self {
        self.accept = Some(accept);
        self
    }

    /// The most messages fetched and not settled, not less than the [`concurrency`](Self::concurrency). Without it 256, or as
    /// many as the handlers that may run at a time take, if that is more.
    pub fn prefetch(&mut self, messages: usize) -> &mut Self {
        self.prefetch = Some(messages);
        self
    }

    /// How long the broker lends a message at a time, and how long in all while its handler runs. It counts where the backend
    /// declares leases; elsewhere a message is the consumer's for as long as its connection lives.
    pub fn lease(&mut self, each: Duration, at_most: Duration) -> &mut Self {
        self.lease = Some((each, at_most));
        self
    }

    /// The most bytes fetched and not settled, where the backend declares it.
    pub fn prefetch_bytes(&mut self, bytes: usize) -> &mut Self {
        self.prefetch_bytes = Some(bytes);
        self
    }

    /// Where a new group of a topic begins.
    pub fn start(&mut self, start: Start) -> &mut Self {
        self.start = Some(start);
        self
    }

    /// The channel must exist: a missing one is an error at start.
    pub fn existing(&mut self) -> &mut Self {
        self.existing = true;
        self
    }

    /// A setting that only one backend knows.
    pub fn with(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.extra.push((key.into(), value.into()));
        self
    }

    /// Refuses what would never handle anything.
    pub(super) fn check_numbers(&self) -> Result<()> {
        let problem = if self.concurrency == 0 {
            "a concurrency of 0: no handler could run"
        } else if self.timeout.is_some_and(|limit| limit.is_zero()) {
            "a timeout of 0: every attempt would fail"
        } else if self.lease.is_some_and(|(each, at_most)| each.is_zero() || at_most < each) {
            "a lease of 0, or one that is longer than it may be in all"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Config, format!("{}: {problem}", self.name))
            .with_operation("start")
            .with_channel(&*self.channel)
            .with_hint("use at least 1, or leave it out"))
    }

    pub(super) fn full_kind(&self, bus: &Bus) -> Result<Option<Kind>> {
        let bound = self.service.body_type().and_then(|body| bus.parts().kinds.get(body)).cloned();
        match (self.kind.clone().or(bound), self.version) {
            (Some(kind), version) => Ok(Some(Kind { version: version.or(kind.version), ..kind })),
            (None, None) => Ok(None),
            (None, Some(version)) => Err(Error::new(
                ErrorKind::Config,
                format!("{} takes version {version} of messages without a kind", self.name),
            )
            .with_channel(&*self.channel)
            .with_hint("derive Message for its argument, or call kind")),
        }
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("address", &self.address()).field("handler", &self.name).finish_non_exhaustive()
    }
}
