//! Everything that must exist at the broker, as one value: planned without changing anything, then made.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use serde::Deserialize;

use crate::{Address, Bus, ChannelKind, ConsumeOptions, Error, ErrorKind, Kinds, Result, Scalar};

/// Queues, topics, groups of topics and bindings that must exist.
///
/// It comes from the handlers of a service ([`ConsumerFactory::topology`](crate::ConsumerFactory::topology)), from the
/// types of a program ([`linked`](Self::linked)), from a file, or from code:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> polymq_core::Result<()> {
/// use polymq_core::{Bus, Topology};
///
/// let bus = Bus::connect("memory://shop").await?;
/// let topology = Topology::new().queue("orders").group("events", "audit");
/// assert_eq!(topology.plan(&bus).await?.steps[0].to_string(), "missing: queue orders");
/// // The queue and the group, each with a queue for its dead letters.
/// assert_eq!(topology.apply(&bus).await?.missing().count(), 4);
/// assert_eq!(topology.apply(&bus).await?.missing().count(), 0);
/// # Ok(()) }
/// ```
///
/// The same in a file, for `polymq topology plan` and `apply`; other keys are options of the backend:
///
/// ```toml
/// [queues.orders]
/// topics = ["events"]        # this queue gets the messages of these topics too
/// queue_type = "quorum"      # RabbitMQ's
///
/// [topics.events]
/// groups = ["audit"]
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    channels: BTreeMap<Key, ConsumeOptions>,
    bindings: Vec<(Address, Address)>,
}

/// A channel, and the group where it is a group's share of a topic.
type Key = (Address, Option<String>);

impl Topology {
    /// Nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What the types with `#[derive(Message)]` of this program name as their queues and topics.
    #[must_use]
    pub fn linked() -> Self {
        Kinds::linked_channels()
            .into_iter()
            .fold(Self::new(), |topology, channel| topology.channel(channel, ConsumeOptions::default()))
    }

    /// Reads a file in TOML.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the file and what is wrong with it.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let problem =
            |why: &dyn fmt::Display| Error::new(ErrorKind::Config, format!("the topology in {path:?}: {why}"));
        let text = std::fs::read_to_string(path).map_err(|error| problem(&error))?;
        Self::from_toml(&text).map_err(|error| problem(&error.message()))
    }

    /// Reads TOML.
    ///
    /// # Errors
    /// [`ErrorKind::Config`].
    pub fn from_toml(text: &str) -> Result<Self> {
        let file: File = toml::from_str(text).map_err(|error| Error::new(ErrorKind::Config, error.to_string()))?;
        let mut topology = Self::new();
        for (name, queue) in file.queues {
            topology = topology.channel(Address::queue(name.as_str()), with_extra(&queue.options));
            for topic in queue.topics {
                topology = topology.bind(name.as_str(), topic);
            }
        }
        for (name, topic) in file.topics {
            let options = with_extra(&topic.options);
            topology = topology.channel(Address::topic(name.as_str()), options.clone());
            for group in topic.groups {
                topology = topology
                    .channel(Address::topic(name.as_str()), ConsumeOptions { group: Some(group), ..options.clone() });
            }
        }
        Ok(topology)
    }

    /// A queue.
    #[must_use]
    pub fn queue(self, name: impl Into<String>) -> Self {
        self.channel(Address::queue(name.into()), ConsumeOptions::default())
    }

    /// A topic.
    #[must_use]
    pub fn topic(self, name: impl Into<String>) -> Self {
        self.channel(Address::topic(name.into()), ConsumeOptions::default())
    }

    /// A group of a topic.
    #[must_use]
    pub fn group(self, topic: impl Into<String>, group: impl Into<String>) -> Self {
        let options = ConsumeOptions { group: Some(group.into()), ..ConsumeOptions::default() };
        self.channel(Address::topic(topic.into()), options)
    }

    /// A channel, or with a group in the options its share of a topic, with options of the backend.
    #[must_use]
    pub fn channel(mut self, address: Address, options: ConsumeOptions) -> Self {
        self.channels.insert((address, options.group.clone()), options);
        self
    }

    /// The queue gets the messages of the topic too.
    #[must_use]
    pub fn bind(mut self, queue: impl Into<String>, topic: impl Into<String>) -> Self {
        self.bindings.push((Address::queue(queue.into()), Address::topic(topic.into())));
        self
    }

    /// This and another one.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.channels.extend(other.channels);
        self.bindings.extend(other.bindings);
        self
    }

    /// What of it exists, with the queues for dead letters. Nothing is changed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the backend cannot look without creating; otherwise as the broker answers: whoever
    /// may not look gets an error, and no step that says "missing".
    pub async fn plan(&self, bus: &Bus) -> Result<TopologyPlan> {
        let mut steps = Vec::new();
        let look = async |address: &Address, group: &Option<String>| {
            let exists = bus.channel(address.clone()).exists(group.as_deref()).await?;
            let state = if exists { StepState::Present } else { StepState::Missing };
            Ok::<_, Error>(Step { what: StepKind::channel(address, group), state })
        };
        for ((address, group), options) in self.in_order(bus) {
            steps.push(look(address, group).await?);
            let Some(letters) = self.letters(bus, address, options) else { continue };
            let what = StepKind::channel(&letters, &None);
            if !steps.iter().any(|step| step.what == what) {
                steps.push(look(&letters, &None).await?);
            }
        }
        for (queue, topic) in &self.bindings {
            let what = StepKind::Binding { queue: queue.clone(), topic: topic.clone() };
            steps.push(Step { what, state: StepState::Ensured });
        }
        Ok(TopologyPlan { steps })
    }

    /// Makes what is missing and says what that was. Everything is looked at before anything is made, and what cannot be
    /// done on this backend is refused before that.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), and those of declaring; what was made before stays.
    pub async fn apply(&self, bus: &Bus) -> Result<TopologyPlan> {
        if !self.bindings.is_empty() && !bus.capabilities().bindings {
            return Err(Error::unsupported(bus.backend(), "binding a queue to a topic").with_operation("apply"));
        }
        let plan = self.plan(bus).await?;
        let missing = |what: StepKind| plan.missing().any(|step| step.what == what);
        for ((address, group), options) in self.in_order(bus) {
            let letters = self.letters(bus, address, options);
            // Declaring a channel makes both, and is harmless to the one that exists.
            if missing(StepKind::channel(address, group))
                || letters.is_some_and(|letters| missing(StepKind::channel(&letters, &None)))
            {
                bus.channel(address.clone()).declare(options.clone()).await?;
            }
        }
        for (queue, topic) in &self.bindings {
            bus.channel(queue.clone()).bind(&bus.channel(topic.clone())).await?;
        }
        Ok(plan)
    }

    /// The channels, each behind its dead-letter queue where that has an entry: made with its channel it would get that
    /// one's options.
    fn in_order(&self, bus: &Bus) -> Vec<(&Key, &ConsumeOptions)> {
        let (mut ordered, mut seen) = (Vec::new(), BTreeSet::new());
        for entry in &self.channels {
            let mut chain = Vec::new();
            let mut next = Some(entry);
            while let Some((key, options)) = next.filter(|(key, _)| seen.insert(*key)) {
                chain.push((key, options));
                let letters = Self::all_letters(bus, &key.0, options);
                next = letters
                    .and_then(|letters| self.channels.get_key_value(&(letters, None)))
                    // One that must be there already is looked for when its channel may have made it.
                    .filter(|(_, options)| options.declare);
            }
            ordered.extend(chain.into_iter().rev());
        }
        ordered
    }

    /// The queue for dead letters that is made with a channel, and has no entry, and maybe options, of its own.
    fn letters(&self, bus: &Bus, address: &Address, options: &ConsumeOptions) -> Option<Address> {
        Self::all_letters(bus, address, options).filter(|letters| !self.channels.contains_key(&(letters.clone(), None)))
    }

    /// The queue for dead letters that is made with a channel; not that of a channel that must exist already. A subscription
    /// without a group makes its own, when it is there.
    fn all_letters(bus: &Bus, address: &Address, options: &ConsumeOptions) -> Option<Address> {
        let kept = address.kind() == ChannelKind::Queue || options.group.is_some();
        (kept && options.declare).then(|| bus.channel(address.clone()).letters_of(options)).flatten()
    }
}

/// The steps from what exists to a [`Topology`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopologyPlan {
    /// In the order in which they are made.
    pub steps: Vec<Step>,
}

impl TopologyPlan {
    /// What does not exist, or did not before it was made.
    pub fn missing(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| step.state == StepState::Missing)
    }
}

impl fmt::Display for TopologyPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "{step}"))
    }
}

/// One thing that must exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub what: StepKind,
    /// Whether it does.
    pub state: StepState,
}

/// What must exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepKind {
    /// A queue, a topic, or a group's share of a topic.
    Channel {
        /// Kind and name.
        address: Address,
        /// The group.
        group: Option<String>,
    },
    /// A queue that gets a topic's messages.
    Binding {
        /// The queue.
        queue: Address,
        /// The topic.
        topic: Address,
    },
}

impl StepKind {
    fn channel(address: &Address, group: &Option<String>) -> Self {
        Self::Channel { address: address.clone(), group: group.clone() }
    }
}

/// Whether something exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepState {
    /// It does not.
    Missing,
    /// It does.
    Present,
    /// Brokers do not tell; it is made sure of, which is harmless when it exists.
    Ensured,
}

impl fmt::Display for StepState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Present => "present",
            Self::Ensured => "ensured",
        })
    }
}

impl fmt::Display for StepKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Channel { address, group: None } => write!(f, "{address}"),
            Self::Channel { address, group: Some(group) } => write!(f, "group {group} of {address}"),
            Self::Binding { queue, topic } => write!(f, "binding of {queue} to {topic}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.state, self.what)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    queues: BTreeMap<String, QueueOf>,
    #[serde(default)]
    topics: BTreeMap<String, TopicOf>,
}

#[derive(Deserialize)]
struct QueueOf {
    #[serde(default)]
    topics: Vec<String>,
    #[serde(flatten)]
    options: BTreeMap<String, Scalar>,
}

#[derive(Deserialize)]
struct TopicOf {
    #[serde(default)]
    groups: Vec<String>,
    #[serde(flatten)]
    options: BTreeMap<String, Scalar>,
}

fn with_extra(options: &BTreeMap<String, Scalar>) -> ConsumeOptions {
    let extra = options.iter().map(|(key, value)| (key.clone(), value.to_string())).collect();
    ConsumeOptions { extra, ..ConsumeOptions::default() }
}
