//! What a case works with.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{Address, Backend, Bus, BusBuilder, Capabilities, Channel, Environment, Registry};

use crate::{BareClient, BrokerControl, Figures, Harness};

/// How long something that must happen may take; generous, because machines of tests are busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long nothing must happen where nothing may.
pub const QUIET: Duration = Duration::from_millis(300);

/// How the panic of a case begins that could not even connect, which says nothing about what the case looks at: a mutant is not
/// caught by that.
pub(crate) const CONNECTING: &str = "connect: ";

/// Multiplies the number of messages in the cases with faults; for nights.
pub const LOAD_VARIABLE: &str = "POLYMQ_TEST_LOAD";

/// What a case works with: connections, channel names of its own, and notes for the summary. Cheap to clone.
#[derive(Clone)]
pub struct Cx(Arc<Inner>);

struct Inner {
    harness: Arc<dyn Harness>,
    case: &'static str,
    capabilities: Capabilities,
    prefix: String,
    names: AtomicUsize,
    addresses: Mutex<Vec<(Address, Option<String>)>>,
    notes: Mutex<Vec<String>>,
    figures: Mutex<Option<Figures>>,
}

impl Cx {
    /// A context for one run of a case.
    #[must_use]
    pub fn new(harness: Arc<dyn Harness>, case: &'static str) -> Self {
        let capabilities = harness.wrap(harness.backend()).capabilities();
        let short: String = case.chars().take_while(|c| *c != '_').flat_map(char::to_lowercase).collect();
        Self(Arc::new(Inner {
            harness,
            case,
            capabilities,
            prefix: format!("{short}-{:08x}", fastrand::u32(..)),
            names: AtomicUsize::new(0),
            addresses: Mutex::default(),
            notes: Mutex::default(),
            figures: Mutex::default(),
        }))
    }

    /// The case.
    #[must_use]
    pub fn case(&self) -> &'static str {
        self.0.case
    }

    /// The harness.
    #[must_use]
    pub fn harness(&self) -> &Arc<dyn Harness> {
        &self.0.harness
    }

    /// What the backend declares.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    /// Whether what was delivered can still be settled after its connection was lost.
    #[must_use]
    pub fn deliveries_outlive_connections(&self) -> bool {
        self.0.capabilities.leases || self.0.harness.deliveries_outlive_connections()
    }

    /// The broker.
    ///
    /// # Panics
    /// When the harness has none.
    #[must_use]
    pub fn broker(&self) -> &dyn BrokerControl {
        self.0.harness.broker().expect("this case needs a broker; the harness has none")
    }

    /// The client that knows nothing of polymq.
    ///
    /// # Panics
    /// When the harness has none.
    #[must_use]
    pub fn bare(&self) -> &dyn BareClient {
        self.0.harness.bare().expect("a backend with a broker must bring a bare client")
    }

    /// A builder for a connection to the backend.
    pub fn builder(&self) -> BusBuilder {
        self.builder_to(self.0.harness.url(None))
    }

    /// The same, to another URL of the harness.
    pub fn builder_to(&self, url: String) -> BusBuilder {
        self.builder_around(url, |backend| backend)
    }

    /// The same, with something around the backend, inside of what the harness puts around it.
    pub fn builder_around(&self, url: String, around: impl FnOnce(Arc<dyn Backend>) -> Arc<dyn Backend>) -> BusBuilder {
        let backend = self.0.harness.wrap(around(self.0.harness.backend()));
        let name = backend.name();
        let mut registry = Registry::new();
        registry.add(backend).expect("one backend is no conflict");
        // The process's environment must not choose for a test.
        let builder = Bus::builder().registry(registry).environment(Environment::default()).backend(name).url(url);
        patient(builder, &*self.0.harness.backend())
    }

    /// The same for a connection of which nothing but a fault may say that it is down: no silence of a busy machine.
    pub(crate) fn steady(&self, builder: BusBuilder) -> BusBuilder {
        let silences = ["connect_timeout", "operation_timeout", "request_timeout", "heartbeat", "keep_alive"];
        with_known(builder, &*self.0.harness.backend(), &silences, "90s")
    }

    /// A fresh connection.
    ///
    /// # Panics
    /// When it cannot be made.
    pub async fn bus(&self) -> Bus {
        self.builder().connect().await.unwrap_or_else(|error| panic!("{CONNECTING}{error:?}"))
    }

    /// A queue's name that nobody else uses; the queue is deleted after the case.
    #[must_use]
    pub fn name(&self) -> String {
        let name = format!("{}-{}", self.0.prefix, self.0.names.fetch_add(1, Ordering::Relaxed));
        self.clean_up(Address::queue(name.as_str()), None);
        name
    }

    /// The same for a topic, with the groups that are to be deleted.
    #[must_use]
    pub fn topic_name(&self, groups: &[&str]) -> String {
        let name = format!("{}-{}", self.0.prefix, self.0.names.fetch_add(1, Ordering::Relaxed));
        for group in groups {
            self.clean_up(Address::topic(name.as_str()), Some((*group).to_owned()));
        }
        self.clean_up(Address::topic(name.as_str()), None);
        name
    }

    /// Deletes this channel after the case, with its dead letters.
    pub fn clean_up(&self, address: Address, group: Option<String>) {
        lock(&self.0.addresses).push((address, group));
    }

    /// A queue of this bus that nobody else uses.
    #[must_use]
    pub fn queue(&self, bus: &Bus) -> Channel {
        bus.queue(self.name())
    }

    /// A line for the summary, such as a ratio of duplicates or a time to recover.
    pub fn note(&self, text: impl fmt::Display) {
        lock(&self.0.notes).push(format!("{}: {text}", self.0.case));
    }

    /// What the case has counted, for the summary and the table of faults.
    pub fn record(&self, figures: Figures) {
        *lock(&self.0.figures) = Some(figures);
    }

    pub(crate) fn take_figures(&self) -> Option<Figures> {
        lock(&self.0.figures).take()
    }

    /// How many messages a case with faults sends: so many, or that many times more where [`LOAD_VARIABLE`] says so.
    #[must_use]
    pub fn load(&self, usual: usize) -> usize {
        let times = std::env::var(LOAD_VARIABLE).ok().and_then(|times| times.parse::<usize>().ok());
        usual * times.unwrap_or(1).max(1)
    }

    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.0.notes))
    }

    /// Deletes what the case has made. Best effort: the case has said already what is wrong.
    pub(crate) async fn delete_all(&self) {
        let addresses = std::mem::take(&mut *lock(&self.0.addresses));
        if addresses.is_empty() {
            return;
        }
        let Ok(bus) = self.builder().connect().await else { return };
        for (address, group) in addresses {
            let letters = address.dead_letters(group.as_deref());
            let channel = bus.channel(address);
            let _ = channel.delete(group.as_deref()).await;
            let _ = bus.channel(letters).delete(None).await;
        }
        let _ = bus.close().await;
    }
}

impl fmt::Debug for Cx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cx").field("case", &self.0.case).field("harness", &self.0.harness).finish_non_exhaustive()
    }
}

/// Twice the usual patience for a broker that is busy with other cases. What is set afterwards goes before.
pub(crate) fn patient(builder: BusBuilder, backend: &dyn Backend) -> BusBuilder {
    with_known(builder, backend, &["connect_timeout", "operation_timeout"], "20s")
}

/// Those of these settings that the backend has.
pub(crate) fn with_known(builder: BusBuilder, backend: &dyn Backend, names: &[&str], value: &str) -> BusBuilder {
    let known = names.iter().filter(|name| backend.keys().iter().any(|key| key.name == **name));
    known.fold(builder, |builder, name| builder.with(*name, value))
}

/// Locks, also after a panic elsewhere: a failed case must not hide behind a poisoned lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
