//! Handlers by channel: what a service consumes, before it runs.

use std::{
    any::type_name,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use crate::{
    Address, BatchHandler, Bus, Capabilities, ChannelKind, ConsumeOptions, Error, ErrorKind, FailurePolicy,
    FromDelivery, Handled, Handler, HandlerError, Kind, Kinds, Result, RetryMode, Start, Text, Topology, TopologyPlan,
    delivery::can_retry,
    handler::{BatchService, FunctionService, Service, Several, States},
    runner::Callbacks,
    serializers::Accept,
    subscription::check_options,
};

/// When a message is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AckMode {
    /// After its handler succeeded. The default: nothing is lost.
    #[default]
    AfterSuccess,
    /// Before its handler is called: at most once, a failure is only reported.
    OnReceipt,
    /// After its handler was called, whether it succeeded or not.
    Always,
}

/// A `#[consumer]` function that is linked into the program; submitted by the macro.
#[derive(Clone, Copy)]
pub struct ConsumerEntry {
    /// The function's path.
    pub name: &'static str,
    /// Adds it to a factory.
    pub register: fn(&mut ConsumerFactory),
}

impl fmt::Debug for ConsumerEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

inventory::collect!(ConsumerEntry);

/// Collects the handlers of a service. Several handlers on one channel share its subscription and take the kinds
/// and versions of their argument's type.
#[derive(Debug)]
pub struct ConsumerFactory {
    bus: Bus,
    routes: Vec<Route>,
    states: States,
    callbacks: Callbacks,
}

impl ConsumerFactory {
    /// A factory without handlers.
    #[must_use]
    pub fn new(bus: &Bus) -> Self {
        Self { bus: bus.clone(), routes: Vec::new(), states: States::default(), callbacks: Callbacks::default() }
    }

    /// A factory with every `#[consumer]` function of the program, in the order of their names.
    #[must_use]
    pub fn linked(bus: &Bus) -> Self {
        let mut factory = Self::new(bus);
        let mut entries: Vec<_> = inventory::iter::<ConsumerEntry>.into_iter().collect();
        entries.sort_by_key(|entry| entry.name);
        for entry in entries {
            (entry.register)(&mut factory);
        }
        factory
    }

    /// The bus that it consumes from.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Handles the messages of a queue; [`Route::group`] makes it a group of a topic.
    pub fn route<Args: 'static>(&mut self, channel: impl Into<Arc<str>>, handler: impl Handler<Args>) -> &mut Route {
        let name = name_of(&handler);
        self.add(channel.into(), name, Arc::new(FunctionService::new(handler)))
    }

    /// Handles up to `max` messages of a queue at once. Never waits for more to come.
    pub fn route_batch<T: FromDelivery + Send + 'static>(
        &mut self,
        channel: impl Into<Arc<str>>,
        max: usize,
        handler: impl BatchHandler<T>,
    ) -> &mut Route {
        let name = name_of(&handler);
        self.add(channel.into(), name, Arc::new(BatchService::new(handler, max)))
    }

    /// Handles the messages of every type that names its channel (`#[message(topic = "...")]`), each channel once; of a topic
    /// as a member of this group.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when no type does.
    pub fn route_declared<Args: 'static>(&mut self, group: &str, handler: impl Handler<Args>) -> Result<&mut Self> {
        let name = name_of(&handler);
        let service: Arc<dyn Service> = Arc::new(FunctionService::new(handler));
        let channels = Kinds::linked_channels();
        if channels.is_empty() {
            return Err(Error::new(ErrorKind::Config, "no type of this program names its channel")
                .with_operation("start")
                .with_hint(
                    "write #[message(topic = \"...\")] or #[message(queue = \"...\")] at a type that derives Message",
                ));
        }
        for channel in channels {
            let route = self.add(channel.shared_name(), name, Arc::clone(&service));
            if channel.kind() == ChannelKind::Topic {
                route.group(group);
            }
        }
        Ok(self)
    }

    /// The channels of these handlers, as they must exist at the broker.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn topology(&self) -> Result<Topology> {
        let with_letters = |plan: Plan| {
            let letters = plan.policy.dead_letter_address(&plan.address, plan.options.group.as_deref());
            (plan.address, ConsumeOptions { dead_letters: Some(letters), ..plan.options })
        };
        let channels = self.plans()?.into_iter().map(with_letters);
        Ok(channels.fold(Topology::new(), |topology, (address, options)| topology.channel(address, options)))
    }

    /// Makes the channels of these handlers that are missing, without consuming anything, and says which those were. For
    /// deployments where the service itself may not create channels.
    ///
    /// # Errors
    /// As [`Topology::apply`].
    pub async fn declare(&self) -> Result<TopologyPlan> {
        self.topology()?.apply(&self.bus).await
    }

    fn add(&mut self, channel: Arc<str>, name: &'static str, service: Arc<dyn Service>) -> &mut Route {
        self.routes.push(Route::new(channel, name, service));
        let last = self.routes.len() - 1;
        &mut self.routes[last]
    }

    /// Gives every handler that asks for `State<T>` this value.
    pub fn state<T: Send + Sync + 'static>(&mut self, value: T) -> &mut Self {
        self.states.insert(Arc::new(value));
        self
    }

    /// Calls back for every attempt of a handler that failed.
    pub fn on_handler_error(&mut self, callback: impl Fn(HandlerError<'_>) + Send + Sync + 'static) -> &mut Self {
        self.callbacks.handler_error = Some(Arc::new(callback));
        self
    }

    /// Calls back for every error of fetching and settling.
    pub fn on_transport_error(&mut self, callback: impl Fn(&Address, &Error) + Send + Sync + 'static) -> &mut Self {
        self.callbacks.transport_error = Some(Arc::new(callback));
        self
    }

    /// Calls back when it is decided what becomes of a message.
    pub fn on_handled(&mut self, callback: impl Fn(Handled<'_>) + Send + Sync + 'static) -> &mut Self {
        self.callbacks.handled = Some(Arc::new(callback));
        self
    }

    /// The channels consumed, each once.
    #[must_use]
    pub fn addresses(&self) -> Vec<Address> {
        let mut addresses: Vec<_> = self.routes.iter().map(Route::address).collect();
        addresses.sort();
        addresses.dedup();
        addresses
    }

    /// Checks everything that can be checked without the broker.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming two handlers of one channel, kind and version;
    /// [`ErrorKind::Unsupported`] for an option that the backend cannot honour; [`ErrorKind::Config`].
    pub fn check(&self) -> Result<()> {
        self.plans().map(drop)
    }

    /// One plan for each subscription.
    pub(crate) fn plans(&self) -> Result<Vec<Plan>> {
        let mut plans: BTreeMap<(Address, Option<String>), Plan> = BTreeMap::new();
        for route in &self.routes {
            let key = (route.address(), route.group.clone());
            let plan = plans.entry(key).or_insert_with(|| Plan::new(route, self));
            plan.join(route, &self.bus)?;
        }
        let mut plans: Vec<_> = plans.into_values().collect();
        for plan in &mut plans {
            plan.filter()?;
            plan.check(&self.bus)?;
        }
        Ok(plans)
    }
}

fn name_of<H>(_: &H) -> &'static str {
    type_name::<H>()
}

/// One handler on one channel, with its options.
pub struct Route {
    channel: Arc<str>,
    topic: bool,
    group: Option<String>,
    name: &'static str,
    service: Arc<dyn Service>,
    parts: Vec<(String, Arc<dyn Service>)>,
    kind: Option<Kind>,
    version: Option<u32>,
    concurrency: usize,
    ordered_by_key: bool,
    transactional: bool,
    only_own_kinds: bool,
    policy: Option<FailurePolicy>,
    timeout: Option<Duration>,
    ack_mode: AckMode,
    accept: Option<Accept>,
    options: ConsumeOptions,
}

impl Route {
    fn new(channel: Arc<str>, name: &'static str, service: Arc<dyn Service>) -> Self {
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
            options: ConsumeOptions::default(),
        }
    }

    fn address(&self) -> Address {
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
    /// fails, only that one is called again. The name is stored with the message, so it must stay the same.
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

    /// Cancels an attempt that takes longer; it counts as failed. Without it an attempt may take for ever.
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

    /// The most messages fetched and not settled.
    pub fn prefetch(&mut self, messages: usize) -> &mut Self {
        self.options.prefetch = messages;
        self
    }

    /// How long the broker lends a message at a time, and how long in all while its handler runs; for backends that
    /// declare leases.
    pub fn lease(&mut self, each: Duration, at_most: Duration) -> &mut Self {
        (self.options.lease, self.options.max_lease) = (each, at_most);
        self
    }

    /// The most bytes fetched and not settled, where the backend declares it.
    pub fn prefetch_bytes(&mut self, bytes: usize) -> &mut Self {
        self.options.prefetch_bytes = bytes;
        self
    }

    /// Where a new group of a topic begins.
    pub fn start(&mut self, start: Start) -> &mut Self {
        self.options.start = start;
        self
    }

    /// The channel must exist: a missing one is an error at start.
    pub fn existing(&mut self) -> &mut Self {
        self.options.declare = false;
        self
    }

    /// A setting that only one backend knows.
    pub fn with(&mut self, key: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.options.extra.push((key.into(), value.into()));
        self
    }

    fn full_kind(&self, bus: &Bus) -> Result<Option<Kind>> {
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

/// A handler and the messages it takes.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) kind: Option<Kind>,
    pub(crate) service: Arc<dyn Service>,
}

impl Entry {
    pub(crate) fn share(&self) -> Self {
        Self { name: self.name, kind: self.kind.clone(), service: Arc::clone(&self.service) }
    }
}

/// A subscription to be made, with its handlers.
pub(crate) struct Plan {
    pub(crate) address: Address,
    pub(crate) options: ConsumeOptions,
    pub(crate) entries: Vec<Entry>,
    pub(crate) policy: FailurePolicy,
    pub(crate) concurrency: usize,
    pub(crate) timeout: Option<Duration>,
    pub(crate) ack_mode: AckMode,
    pub(crate) accept: Accept,
    pub(crate) states: States,
    pub(crate) callbacks: Callbacks,
    only_own_kinds: bool,
    chosen: Option<FailurePolicy>,
}

impl Plan {
    fn new(route: &Route, factory: &ConsumerFactory) -> Self {
        Self {
            address: route.address(),
            options: ConsumeOptions { group: route.group.clone(), ..route.options.clone() },
            entries: Vec::new(),
            policy: FailurePolicy::default(),
            concurrency: 1,
            timeout: None,
            ack_mode: route.ack_mode,
            accept: factory.bus.parts().accept.clone(),
            states: factory.states.clone(),
            callbacks: factory.callbacks.clone(),
            only_own_kinds: false,
            chosen: None,
        }
    }

    /// Adds one more handler to the subscription. Its options must not contradict those of the others.
    fn join(&mut self, route: &Route, bus: &Bus) -> Result<()> {
        let kind = route.full_kind(bus)?;
        if let Some(other) = self.entries.iter().find(|entry| entry.kind == kind) {
            let takes = kind.as_ref().map_or_else(|| "any kind".to_owned(), ToString::to_string);
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{} and {} both handle {takes} of {}", other.name, route.name, self.address),
            )
            .with_hint("give them different kinds or versions, or use Route::also for both to see each message"));
        }
        let contradicts = |what: &str| {
            Error::new(ErrorKind::Conflict, format!("the handlers of {} ask for different {what}", self.address))
                .with_hint("they share one subscription: say it once")
        };
        if route.ack_mode != self.ack_mode {
            return Err(contradicts("acknowledgement modes"));
        }
        match (&self.chosen, &route.policy) {
            (Some(chosen), Some(other)) if chosen != other => return Err(contradicts("failure policies")),
            (None, Some(policy)) => {
                self.chosen = Some(policy.clone());
                self.policy = policy.clone();
            }
            _ => {}
        }
        self.concurrency = self.concurrency.max(route.concurrency);
        self.timeout = self.timeout.max(route.timeout);
        self.options.declare &= route.options.declare;
        self.options.prefetch = self.options.prefetch.max(route.options.prefetch);
        if let Some(accept) = &route.accept {
            self.accept = accept.clone();
        }
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
            Arc::new(Several(parts))
        };
        if let Some((_, state)) = service.needed_states().into_iter().find(|(id, _)| !self.states.has(*id)) {
            return Err(Error::new(
                ErrorKind::Config,
                format!("{} of {} needs a state of type {state}, and none was given", route.name, self.address),
            )
            .with_hint("call ConsumerFactory::state before the runner starts"));
        }
        self.entries.push(Entry { name: route.name, kind, service });
        Ok(())
    }

    /// Asks the broker for no other kinds, where a handler wants that.
    fn filter(&mut self) -> Result<()> {
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

    fn check(&self, bus: &Bus) -> Result<()> {
        let (backend, capabilities) = (bus.backend(), bus.capabilities());
        bus.parts().check_address(&self.address)?;
        self.policy.check(&self.address)?;
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
