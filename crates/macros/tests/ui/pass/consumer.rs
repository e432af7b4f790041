//! Every option of `#[consumer]`, each with its own function.
#![deny(warnings)]
use std::time::Duration;

use polymq::{Attempt, Backoff, ConsumerEntry, Headers, MessageId, prelude::*};

const QUEUE: &str = "from.a.constant";
const WORKERS: usize = 4;

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
}

#[consumer("orders")]
async fn plain(order: Order) -> Result<()> {
    println!("{}", order.id);
    Ok(())
}

#[consumer(
    "audit",
    group = "audit",
    kind = "order.created",
    version = 2,
    concurrency = 8,
    timeout = "5s",
    prefetch = 50,
    attempts = 3,
    retry = "redeliver",
    dead_letters = "audit.failed",
    existing,
    ack = "on_receipt"
)]
async fn everything(_order: Order, _context: Context, _id: MessageId, _headers: Headers, _attempt: Attempt) {}

#[consumer(QUEUE, concurrency = WORKERS, timeout = "1m 30s", ordered_by_key, with("qos", "2"), with("retain", "true"))]
async fn constants(Json(_order): Json<Order>) -> Outcome {
    Outcome::Ack
}

#[consumer("live", broadcast, ack = "always")]
async fn live(_body: Body, _state: State<Duration>) {}

#[consumer("batches", batch = 128)]
async fn batches(orders: Batch<Order>) -> Vec<Outcome> {
    orders.iter().map(|_| Outcome::Ack).collect()
}

#[consumer("reports", blocking)]
fn report(_order: Order) -> std::result::Result<(), std::io::Error> {
    Ok(())
}

fn patient() -> FailurePolicy {
    FailurePolicy { backoff: Backoff::fixed(Duration::from_secs(1)), ..FailurePolicy::default() }
}

#[consumer("patient", policy = patient())]
pub async fn with_policy() -> Result {
    Ok(())
}

#[consumer("absent")]
#[cfg(any())]
async fn absent(_order: Absent) {}

mod inner {
    use polymq::consumer;

    #[consumer("inner")]
    pub(crate) async fn handle() {}
}

macro_rules! many {
    ($($name:ident $queue:expr, $limit:expr;)*) => {$(
        #[consumer($queue, concurrency = $limit)]
        async fn $name() {}
    )*};
}
many! { one "one", 1; two "two", WORKERS; }

fn main() {
    // The functions are ordinary functions still.
    let _ = plain(Order { id: 1 });
    let _ = inner::handle();
    let mut names: Vec<_> =
        polymq::__private::inventory::iter::<ConsumerEntry>.into_iter().map(|entry| entry.name).collect();
    names.sort();
    assert_eq!(names.len(), 10, "{names:?}");
    assert!(names.iter().any(|name| name.ends_with("::inner::handle")), "{names:?}");
}
