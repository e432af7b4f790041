//! Suite F11, the half that needs several nodes: those of a cluster of three are killed, the one that leads the partition and
//! the one that coordinates the group, while messages are sent and handled. Leaders and coordinators move, and nothing is lost.

mod common;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use common::bare::Bare;
use polymq_core::{Bus, Channel, ConsumerFactory, ConsumerRunner, HealthState, Message, Retry};
use polymq_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use polymq_testkit::{Broker, BrokerControl, Ledger, closes, eventually};

/// Longer than leaders take to move, several times, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(150);
/// Where Kafka keeps the positions of groups; its leader coordinates them.
const POSITIONS: &str = "__consumer_offsets";

type Bodies = Arc<Mutex<Vec<String>>>;

fn count(bodies: &Bodies) -> usize {
    bodies.lock().expect("no panic").len()
}

#[derive(Debug)]
struct Cluster {
    nodes: Vec<Broker>,
    servers: String,
}

impl Cluster {
    fn start() -> Self {
        let nodes = Broker::kafka_cluster(3);
        let servers = nodes.iter().map(|node| node.address().to_string()).collect::<Vec<_>>().join(",");
        Self { nodes, servers }
    }

    /// How many nodes are to have a copy of the first partition of a topic.
    fn copies(&self, topic: &str) -> Option<usize> {
        tokio::task::block_in_place(|| {
            let asking: BaseConsumer = Bare { servers: self.servers.clone() }.config().create().expect("a client");
            let metadata = asking.fetch_metadata(Some(topic), Duration::from_secs(20)).ok()?;
            Some(metadata.topics().first()?.partitions().first()?.replicas().len())
        })
    }

    /// Who leads the first partition of a topic, by its number among the nodes, and how many have a copy that is up to date.
    fn leads(&self, topic: &str) -> Option<(usize, usize)> {
        tokio::task::block_in_place(|| {
            let asking: BaseConsumer = Bare { servers: self.servers.clone() }.config().create().expect("a client");
            let metadata = asking.fetch_metadata(Some(topic), Duration::from_secs(20)).ok()?;
            let partition = metadata.topics().first()?.partitions().first()?;
            // They are numbered from one; minus one is nobody.
            Some((usize::try_from(partition.leader() - 1).ok()?, partition.isr().len()))
        })
    }

    async fn leader(&self, topic: &str) -> usize {
        eventually(PATIENCE, || async {
            // With fewer copies, another kill would leave too few for anybody to write.
            match self.leads(topic) {
                Some((leader, 3)) => Ok(leader),
                other => Err(format!("{topic}: {other:?}")),
            }
        })
        .await
    }
}

/// Sends numbered messages until it is told to end; each is sent until it is accepted.
async fn sends(queue: Channel, accepted: Bodies, ends: Arc<AtomicBool>) {
    while !ends.load(Ordering::SeqCst) {
        let body = format!("m-{:06}", count(&accepted));
        send(&queue, &body).await;
        accepted.lock().expect("no panic").push(body);
    }
}

async fn send(queue: &Channel, body: &str) {
    let (message, began) = (Message::new(body.to_owned()).with_id(body), Instant::now());
    while let Err(error) = queue.send_message(message.clone()).await {
        assert!(error.retry() != Retry::Never, "an error without hope: {error:?}");
        assert!(began.elapsed() < PATIENCE, "{body} is not sent in the end: {error:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Mission row H7: a topic has as many copies as were asked for; where nothing was asked, the broker's default, which is three here.
async fn copies_are_made_as_they_are_wanted(cluster: &Cluster, url: &str) {
    for wanted in [1, 2, 3] {
        let bus = Bus::connect(&format!("{url}&replication={wanted}")).await.expect("connect");
        let topic = format!("copies-{wanted}");
        send(&bus.queue(topic.as_str()), &wanted.to_string()).await;
        eventually(PATIENCE, || async {
            let found = cluster.copies(&topic);
            if found == Some(wanted) { Ok(()) } else { Err(format!("{found:?} copies, {wanted} were wanted")) }
        })
        .await;
        closes(&bus).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(non_snake_case, reason = "the suite's name for it")]
async fn F11_leaders_move() {
    let cluster = Cluster::start();
    let url = format!("kafka://?servers={}&user=admin&pass=secret&connect_timeout=60s", cluster.servers);
    copies_are_made_as_they_are_wanted(&cluster, &url).await;
    let bus = Bus::builder().url(url).connect().await.expect("connect");
    let (topic, handled, accepted) = ("moving", Bodies::default(), Bodies::default());
    let mut consumers = ConsumerFactory::new(&bus);
    let log = Arc::clone(&handled);
    let route = consumers.route(topic, move |message: Message| {
        let log = Arc::clone(&log);
        async move {
            let id = message.id().map(ToString::to_string).unwrap_or_default();
            assert_eq!(id.as_bytes(), &message.payload()[..], "each has the id that it was sent with");
            log.lock().expect("no panic").push(id);
        }
    });
    route.concurrency(4);
    let running = ConsumerRunner::new(consumers).start().await.expect("started");
    let ends = Arc::new(AtomicBool::new(false));
    let sending = tokio::spawn(sends(bus.queue(topic), Arc::clone(&accepted), Arc::clone(&ends)));

    let mut killed = Vec::new();
    for of in [topic, POSITIONS, topic] {
        for topic in [topic, POSITIONS] {
            cluster.leader(topic).await;
        }
        let node = cluster.leader(of).await;
        cluster.nodes[node].kill().await;
        let gone = Instant::now();
        let (sent, seen) = (count(&accepted), count(&handled));
        killed.push((of, node));
        // One of three is down, and both directions work: what was accepted meanwhile may have been under way.
        eventually(PATIENCE, || async {
            let more = (count(&accepted) - sent, count(&handled) - seen);
            if more.0 >= 200 && more.1 >= 200 {
                Ok(())
            } else {
                Err(format!("{more:?} after {killed:?}; {}", bus.health()))
            }
        })
        .await;
        eprintln!("the node that led {of}, {node}, is gone: works again after {:?}", gone.elapsed());
        assert!(!matches!(bus.health().state, HealthState::Closed), "{}", bus.health());
        eventually(PATIENCE, || async {
            match cluster.leads(of) {
                Some((leader, 2)) if leader != node => Ok(()),
                other => Err(format!("{of} after {killed:?}: {other:?}")),
            }
        })
        .await;
        cluster.nodes[node].start().await;
    }
    ends.store(true, Ordering::SeqCst);
    sending.await.expect("the sender");
    let sent = accepted.lock().expect("no panic").clone();
    eventually(PATIENCE, || async {
        let mut ledger = Ledger::sent(&sent);
        handled.lock().expect("no panic").iter().for_each(|body| ledger.see(body));
        let missing = ledger.missing();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("{} of {} are lost: {missing:?}", missing.len(), sent.len()))
        }
    })
    .await;
    // What stopping and closing wait for may take longer on a machine that stands still.
    let _ = running.stop().await;
    let handled = handled.lock().expect("no panic").clone();
    let (once, sent): (HashSet<_>, HashSet<_>) = (handled.iter().collect(), sent.iter().collect());
    eprintln!("{} accepted, {} handled, {} more than once", sent.len(), once.len(), handled.len() - once.len());
    assert!(once.iter().all(|body| sent.contains(body)), "nothing is handled that was not sent");
    let _ = bus.close().await;
}
