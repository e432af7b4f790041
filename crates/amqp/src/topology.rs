//! Queues, the topic exchange, dead-letter queues and delay queues: what they are called and how they come to be.

use std::{sync::Arc, time::Duration};

use lapin::{
    Channel, Connection, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, LongString},
};
use polymq_core::{Address, ChannelKind, Error, ErrorKind, Result};

use crate::{
    config::{Declare, QueueType},
    convert::short,
    error::{self, Stage},
};

/// The exchange behind topics, unless another one is set. RabbitMQ has it in each virtual host.
pub(crate) const TOPIC_EXCHANGE: &str = "amq.topic";
/// Longest name that AMQP carries.
const MAX_NAME: usize = 255;
/// Room for `.waitq.<millis>` behind a queue's name.
const MAX_DELAY_SUFFIX: usize = 17;

/// The longest delay: TTLs and expiry times of RabbitMQ are milliseconds in 32 bits, 49 days, and a delay queue must
/// outlive its messages.
pub(crate) const MAX_DELAY: Duration = Duration::from_secs(30 * 24 * 3600);

/// How long a classic delay queue outlives the last message that it may hold. Too small, and a publisher that stalls
/// between declaring it and writing to it loses the queue under its message.
pub(crate) const DELAY_MARGIN: Duration = Duration::from_secs(120);

/// A queue to be, or to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QueuePlan {
    pub(crate) name: Arc<str>,
    /// Where the broker itself puts what a foreign consumer rejects.
    pub(crate) dead_letters: Option<Arc<str>>,
    pub(crate) binding: Option<Binding>,
    /// Belongs to this connection and ends with it.
    pub(crate) exclusive: bool,
    pub(crate) queue_type: QueueType,
    pub(crate) declare: Declare,
}

/// A queue's share of a topic exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) exchange: Arc<str>,
    pub(crate) pattern: Arc<str>,
}

/// The queue of a group of a topic.
pub(crate) fn group_queue(topic: &str, group: &str) -> String {
    format!("{topic}@{group}")
}

/// The queue from which an address is consumed; `None` for a topic without a group, whose queue is its own.
pub(crate) fn queue_name(address: &Address, group: Option<&str>) -> Result<Option<String>> {
    let name = match (address.kind(), group) {
        (ChannelKind::Queue, _) => {
            check_queue_name(address.name())?;
            return Ok(Some(address.name().to_owned()));
        }
        (ChannelKind::Topic, Some(group)) => {
            if group.is_empty() || group.contains('@') {
                let problem =
                    format!("the group name {group:?} is empty or holds an @, which separates topic and group");
                return Err(error::invalid(problem).with_hint("use another name"));
            }
            group_queue(address.name(), group)
        }
        (ChannelKind::Topic, None) => return Ok(None),
    };
    check_name(&name)?;
    Ok(Some(name))
}

/// Whether a queue or topic may be called so. A queue with an @ could be that of a group of a topic, and so could the dead letters of
/// a topic with one.
pub(crate) fn check_address(address: &Address) -> Result<()> {
    match address.kind() {
        ChannelKind::Queue => check_queue_name(address.name()),
        ChannelKind::Topic => check_separator(address),
    }
}

pub(crate) fn check_queue_name(name: &str) -> Result<()> {
    check_separator(&Address::queue(name))?;
    check_name(name)
}

fn check_separator(address: &Address) -> Result<()> {
    if !address.name().contains('@') {
        return Ok(());
    }
    let problem =
        format!("the {} name {:?} holds an @, which separates topic and group", address.kind(), address.name());
    Err(error::invalid(problem).with_hint("use another name"))
}

fn check_name(name: &str) -> Result<()> {
    if name.starts_with("amq.") {
        return Err(error::invalid(format!(
            "the queue name {name:?} starts with amq., which RabbitMQ keeps for itself"
        )));
    }
    if name.len() + MAX_DELAY_SUFFIX > MAX_NAME {
        let problem =
            format!("the queue name of {} bytes leaves no room for the names of its delay queues", name.len());
        return Err(error::invalid(problem).with_hint("shorten the topic or the group"));
    }
    Ok(())
}

/// Wildcards are for those who consume.
pub(crate) fn has_wildcard(topic: &str) -> bool {
    topic.split('.').any(|word| word == "*" || word == "#")
}

/// The delay that a queue exists for: at least as long as asked, in steps, so that jitter does not make a queue a message.
/// A quorum queue stays for good, and is dear, so there are few: eight for each doubling of the delay.
pub(crate) fn delay_step(delay: Duration, queue_type: QueueType) -> Duration {
    let millis = u64::try_from(delay.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
    let step = match millis {
        _ if queue_type == QueueType::Quorum => (millis.checked_next_power_of_two().unwrap_or(millis) / 16).max(100),
        0..=10_000 => 100,
        10_001..=600_000 => 1_000,
        600_001..=3_600_000 => 10_000,
        3_600_001..=86_400_000 => 60_000,
        _ => 600_000,
    };
    Duration::from_millis(millis.div_ceil(step).max(1).saturating_mul(step))
}

/// Makes sure that the plan's queue, its binding and its dead-letter queue exist.
///
/// A queue that exists is taken as it is: another tool may have made it with arguments that we do not know, and
/// asking for ours would be refused. Only a missing queue is made, and always with the same arguments, whoever of
/// producer and consumer comes first. One that belongs to this connection is always missing, and made whatever the
/// settings say of the queues that programs share.
pub(crate) async fn ensure(connection: &Connection, plan: &QueuePlan) -> Result<()> {
    let missing = match plan.declare {
        _ if plan.exclusive => true,
        Declare::None => return Ok(()),
        Declare::Auto => !exists(connection, &plan.name).await?,
        Declare::Passive if exists(connection, &plan.name).await? => return Ok(()),
        Declare::Passive => return Err(not_found("queue", &plan.name)),
    };
    if let Some(dead_letters) = &plan.dead_letters
        && plan.declare == Declare::Auto
        && !exists(connection, dead_letters).await?
    {
        make(connection, dead_letters, plan, false, kept(plan)).await?;
    }
    if missing {
        let mut arguments = kept(plan);
        if let Some(dead_letters) = &plan.dead_letters {
            dead_letter_to(&mut arguments, "", dead_letters);
        }
        make(connection, &plan.name, plan, plan.exclusive, arguments).await?;
    }
    let Some(binding) = &plan.binding else { return Ok(()) };
    let channel = open(connection).await?;
    bind(&channel, &plan.name, binding).await?;
    close(&channel).await;
    Ok(())
}

/// Makes a queue that was missing when it was looked for. Whoever was faster since then, with other arguments, has made it: it is
/// taken as it is.
async fn make(
    connection: &Connection,
    name: &str,
    plan: &QueuePlan,
    exclusive: bool,
    arguments: FieldTable,
) -> Result<()> {
    // One of its own: a refusal ends it.
    let channel = open(connection).await?;
    match create(&channel, name, plan.queue_type, exclusive, arguments).await {
        Err(error) if error.kind() == ErrorKind::Conflict && !exclusive && exists(connection, name).await? => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            close(&channel).await;
            Ok(())
        }
    }
}

/// From now on a queue, which must exist, gets what its binding asks for.
pub(crate) async fn bind(channel: &Channel, queue: &str, binding: &Binding) -> Result<()> {
    let (name, exchange, pattern) = (short(queue)?, short(&*binding.exchange)?, short(&*binding.pattern)?);
    let bound = channel.queue_bind(name, exchange, pattern, QueueBindOptions::default(), FieldTable::default());
    bound.await.map_err(|error| failed(error, queue))
}

/// Makes sure that the topic exchange exists. RabbitMQ's own (`amq.*`) always does.
pub(crate) async fn ensure_exchange(connection: &Connection, exchange: &str, declare: Declare) -> Result<()> {
    if declare == Declare::None || exchange.starts_with("amq.") {
        return Ok(());
    }
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let found = declare_exchange(connection, exchange, passive).await;
    match found {
        Err(error) if error.kind() == ErrorKind::NotFound && declare == Declare::Auto => {
            declare_exchange(connection, exchange, durable).await
        }
        found => found,
    }
}

/// Whether an exchange exists.
pub(crate) async fn exchange_exists(connection: &Connection, exchange: &str) -> Result<bool> {
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    match declare_exchange(connection, exchange, passive).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

async fn declare_exchange(connection: &Connection, exchange: &str, options: ExchangeDeclareOptions) -> Result<()> {
    let channel = open(connection).await?;
    let declared =
        channel.exchange_declare(short(exchange)?, ExchangeKind::Topic, options, FieldTable::default()).await;
    declared.map_err(|error| failed(error, exchange))?;
    close(&channel).await;
    Ok(())
}

/// Whether a queue exists. One that belongs to somebody's connection, such as a queue for replies, may not be looked at by
/// others, but is there and takes their messages.
pub(crate) async fn exists(connection: &Connection, queue: &str) -> Result<bool> {
    match inspect(connection, queue).await {
        Ok(found) => Ok(found.is_some()),
        Err(error) if error.kind() == ErrorKind::Conflict => Ok(true),
        Err(error) => Err(error),
    }
}

/// Counts of a queue, `None` when it does not exist. Uses a channel of its own, because the broker ends it on a no.
pub(crate) async fn inspect(connection: &Connection, queue: &str) -> Result<Option<lapin::Queue>> {
    let channel = open(connection).await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(short(queue)?, passive, FieldTable::default()).await {
        Ok(found) => {
            close(&channel).await;
            Ok(Some(found))
        }
        Err(error) => match failed(error, queue) {
            error if error.kind() == ErrorKind::NotFound => Ok(None),
            error => Err(error),
        },
    }
}

/// A queue that holds messages for `delay` and then sends them on. A classic one goes away by itself when nobody declares
/// it again for longer than its messages live, so it is declared before every use. A quorum queue would go when its time
/// is over, declared again or not and whatever is in it (rabbitmq-server#5894), so it stays.
pub(crate) async fn ensure_delay(channel: &Channel, delay: &DelayQueue<'_>) -> Result<()> {
    let mut arguments = FieldTable::default();
    // What is said here must not depend on the virtual host's default type.
    arguments.insert("x-queue-type".into(), text(if delay.is_quorum() { "quorum" } else { "classic" }));
    let millis = |duration: Duration| AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX));
    arguments.insert("x-message-ttl".into(), millis(delay.ttl));
    dead_letter_to(&mut arguments, delay.exchange, delay.routing_key);
    if !delay.is_quorum() {
        arguments.insert("x-expires".into(), millis(delay.ttl + DELAY_MARGIN));
    } else if delay.exchange.is_empty() {
        // Classic queues give a message up before its target has it on disk; quorum queues can wait for that. Not for a
        // topic: what nobody is bound to would be kept, for whoever is one day.
        arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
        arguments.insert("x-overflow".into(), text("reject-publish"));
    }
    create(channel, &delay.name(), delay.queue_type, false, arguments).await
}

/// Where a delayed message goes afterwards.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DelayQueue<'a> {
    pub(crate) exchange: &'a str,
    pub(crate) routing_key: &'a str,
    pub(crate) ttl: Duration,
    pub(crate) queue_type: QueueType,
}

impl DelayQueue<'_> {
    /// `<queue>.wait.<millis>`, of a quorum queue `.waitq.`: each name always has the same arguments. `.delay.` are those of
    /// older versions, with others. For a topic `<topic>@.wait.<millis>`, which is no group's queue, or
    /// `<topic>@@<exchange>.wait.<millis>`, with eight digits for the name of the exchange, when that is not the default one.
    pub(crate) fn name(&self) -> String {
        let topic = match self.exchange {
            "" => String::new(),
            TOPIC_EXCHANGE => "@".into(),
            other => format!("@@{:08x}", digest(other)),
        };
        let wait = if self.is_quorum() { "waitq" } else { "wait" };
        format!("{}{topic}.{wait}.{}", self.routing_key, self.ttl.as_millis())
    }

    fn is_quorum(&self) -> bool {
        self.queue_type == QueueType::Quorum
    }
}

/// FNV-1a: the names of queues depend on it, so it must never change.
fn digest(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

async fn create(
    channel: &Channel,
    name: &str,
    queue_type: QueueType,
    exclusive: bool,
    mut arguments: FieldTable,
) -> Result<()> {
    let options = QueueDeclareOptions {
        durable: !exclusive,
        exclusive,
        auto_delete: exclusive,
        ..QueueDeclareOptions::default()
    };
    if queue_type == QueueType::Quorum && !exclusive {
        arguments.insert("x-queue-type".into(), text("quorum"));
    }
    channel.queue_declare(short(name)?, options, arguments).await.map_err(|error| failed(error, name))?;
    Ok(())
}

/// RabbitMQ 4 drops what has come back to a quorum queue 20 times, unless it is told another limit: this one is never reached.
fn kept(plan: &QueuePlan) -> FieldTable {
    let mut arguments = FieldTable::default();
    if plan.queue_type == QueueType::Quorum && !plan.exclusive {
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
    }
    arguments
}

fn dead_letter_to(arguments: &mut FieldTable, exchange: &str, routing_key: &str) {
    arguments.insert("x-dead-letter-exchange".into(), text(exchange));
    arguments.insert("x-dead-letter-routing-key".into(), text(routing_key));
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}

async fn open(connection: &Connection) -> Result<Channel> {
    connection.create_channel().await.map_err(|error| error::native("declare", error, Stage::Operation))
}

async fn close(channel: &Channel) {
    // A channel that is gone already is as closed as it can be.
    let _ = channel.close(200, "done".into()).await;
}

fn failed(error: lapin::Error, name: &str) -> Error {
    error::native("declare", error, Stage::Operation).with_channel(name)
}

#[cold]
pub(crate) fn not_found(what: &str, name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the {what} does not exist and is not to be made"))
        .with_backend(crate::NAME)
        .with_operation("declare")
        .with_channel(name)
        .with_hint("create it, or allow it with declare")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_rounded_up_to_steps_and_never_shortened() {
        let ms = Duration::from_millis;
        for (asked, given) in [
            (ms(1), ms(100)),
            (ms(100), ms(100)),
            (ms(101), ms(200)),
            (Duration::from_nanos(100_000_001), ms(200)),
            (ms(10_000), ms(10_000)),
            (ms(10_001), ms(11_000)),
            (ms(600_001), ms(610_000)),
            (ms(3_600_001), ms(3_660_000)),
            (ms(86_400_001), ms(87_000_000)),
            (MAX_DELAY, MAX_DELAY),
        ] {
            assert_eq!(delay_step(asked, QueueType::Classic), given, "{asked:?}");
        }
        for (asked, given) in [(1, 100), (1_700, 1_792), (60_000, 61_440), (3_600_000, 3_670_016)] {
            assert_eq!(delay_step(ms(asked), QueueType::Quorum), ms(given), "{asked}");
        }
        for millis in (0..200_000_000).step_by(9_973) {
            let (asked, given) = (ms(millis), delay_step(ms(millis), QueueType::Classic));
            assert!(given >= asked && given <= asked + asked / 10 + ms(100), "{asked:?} {given:?}");
            let given = delay_step(asked, QueueType::Quorum);
            assert!(given >= asked && given <= asked + asked / 8 + ms(100), "{asked:?} {given:?}");
        }
        // The timers of the broker have 32 bits.
        assert!(u32::try_from((MAX_DELAY + DELAY_MARGIN).as_millis()).is_ok());
        assert!(u32::try_from(delay_step(MAX_DELAY, QueueType::Quorum).as_millis()).is_ok());
    }

    #[test]
    fn names_fit_and_do_not_collide() {
        let longest = "q".repeat(200);
        assert!(check_queue_name(&longest).is_ok());
        for queue_type in [QueueType::Classic, QueueType::Quorum] {
            let name_of = |exchange, routing_key: &str| {
                DelayQueue { exchange, routing_key, ttl: delay_step(MAX_DELAY, queue_type), queue_type }.name()
            };
            assert!(name_of("", &"q".repeat(MAX_NAME - MAX_DELAY_SUFFIX)).len() <= MAX_NAME);
            assert!(name_of("e", &"q".repeat(200)).len() <= MAX_NAME);
            let names = ["", TOPIC_EXCHANGE, "e", "f"].map(|exchange| name_of(exchange, "t"));
            assert_eq!(names.iter().collect::<std::collections::HashSet<_>>().len(), 4, "{names:?}");
        }
        let other = DelayQueue {
            exchange: "events",
            routing_key: "t",
            ttl: Duration::from_secs(1),
            queue_type: QueueType::Classic,
        };
        assert_eq!(other.name(), "t@@12d8e384.wait.1000", "programs of other versions find it");
        assert!(queue_name(&Address::topic("t".repeat(200)), Some(&"g".repeat(100))).is_err());
        assert!(queue_name(&Address::topic("t"), Some("a@b")).is_err());
        assert!(queue_name(&Address::queue("amq.mine"), None).is_err());
        let group = queue_name(&Address::topic("orders"), Some("audit")).expect("valid").expect("a queue");
        assert!(queue_name(&Address::queue(group), None).is_err(), "the queue of a group is no queue of another name");
        assert_eq!(queue_name(&Address::topic("a.b"), Some("g")).expect("valid").as_deref(), Some("a.b@g"));
        assert!(has_wildcard("a.*.c") && has_wildcard("#") && !has_wildcard("a.b*") && !has_wildcard("a.#b"));
    }
}
