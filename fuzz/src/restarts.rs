//! The steps of the other targets on a broker that keeps its data in a folder and is stopped and started again in between.
//!
//! What must hold is what holds without that: what was answered is still there, what was acknowledged does not come again,
//! sequences and times stay, and readers go on where they were. What was on its way to them counts as delivered.

use std::path::Path;

use arbitrary::Arbitrary;
use polymq_broker::Broker;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{Client, connect, events, queues, runtime};

/// A start takes as long as many steps.
const STEPS: usize = 32;
const RESTARTS: usize = 3;

#[derive(Debug, Arbitrary)]
pub enum Step {
    Queues(queues::Step),
    Events(events::Step),
    /// With streams that are open until the broker ends them, or that end before.
    Restart {
        open: bool,
    },
}

struct World {
    folder: TempDir,
    broker: Broker,
    queues: queues::Model,
    events: events::Model,
}

async fn start(folder: &Path) -> (Broker, Channel) {
    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder).start().await.unwrap();
    let channel = connect(&broker).await;
    (broker, channel)
}

/// In memory where there is such a folder: what a sync of the disk takes would be most of the time.
fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("polymq-fuzz-").tempdir_in("/dev/shm");
    folder.or_else(|_| TempDir::new()).unwrap()
}

pub fn run(steps: &[Step]) {
    if steps.is_empty() {
        return;
    }
    runtime().block_on(async {
        let folder = folder();
        let (broker, channel) = start(folder.path()).await;
        let client = Client::new(channel);
        let queues = queues::Model::new(client.clone(), "q".into());
        let mut world = World { folder, broker, queues, events: events::Model::new(client, "e".into()) };
        let mut restarts = 0;
        for step in steps.iter().take(STEPS) {
            match step {
                Step::Queues(step) => world.queues.step(step).await,
                Step::Events(step) => world.events.step(step).await,
                Step::Restart { open } if restarts < RESTARTS => {
                    restarts += 1;
                    world = world.restart(*open).await;
                }
                Step::Restart { .. } => {}
            }
        }
        let World { queues, events, broker, .. } = world.restart(false).await;
        queues.end().await;
        events.end().await;
        assert!(broker.stop().await.is_none());
    });
}

impl World {
    async fn restart(mut self, open: bool) -> Self {
        self.queues.before_stop().await;
        self.events.learn().await;
        if !open {
            self.queues.leave().await;
            self.events.cut();
        }
        assert!(self.broker.stop().await.is_none(), "everything is on disk");
        self.queues.leave().await;
        self.events.cut();
        let (broker, channel) = start(self.folder.path()).await;
        (self.queues.client, self.events.client) = (Client::new(channel.clone()), Client::new(channel));
        self.events.learn().await;
        Self { broker, ..self }
    }
}
