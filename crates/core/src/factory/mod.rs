//! Handlers by channel: what a service consumes, before it runs.

mod plan;
mod route;

pub(crate) use plan::{Entry, Plan};
pub use route::{AckMode, Route};

use std::{any::type_name, collections::BTreeMap, fmt, sync::Arc};

use crate::{
    Address, BatchHandler, Bus, ChannelKind, ConsumeOptions, Error, ErrorKind, FromDelivery, Handled, Handler,
    HandlerError, Kinds, Result, Topology, TopologyPlan,
    handler::{BatchService, FunctionService, Service, States},
    runner::Callbacks,
};

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
            let dead_letters = plan.dead_letters(&self.bus);
            (plan.address, ConsumeOptions { dead_letters, ..plan.options })
        };
        let channels = self.plans()?.into_iter().map(with_letters);
        Ok(channels.fold(Topology::new(), |topology, (address, options)| topology.channel(address, options)))
    }

    /// Makes the channels and dead-letter queues of these handlers that are missing, without consuming anything, and says
    /// which those were. For deployments where the service itself may not create channels.
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
            plan.feed()?;
            plan.filter()?;
            plan.check(&self.bus)?;
        }
        Ok(plans)
    }
}

fn name_of<H>(_: &H) -> &'static str {
    type_name::<H>()
}
