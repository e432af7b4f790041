//! F18: the machine's clock is set while messages wait.

use std::time::Duration;

use polymq_core::{Attempt, ConsumerFactory, Failure, Message, State, set_clock_forward};
use tokio::time::Instant;

use super::{scenario::leaves_no_task, states::States};
use crate::{
    Case, Cx, Figures, PATIENCE,
    case::run,
    drive::{Log, bodies, closes, publish, retry_every, start},
    eventually,
};

pub(in crate::cases) const CASES: &[Case] = &[Case::new("F18_clock_jumps", run!(clock_jumps)).alone()];

/// The clock is right again after the case, however it ends.
struct Clock(i64);

impl Clock {
    fn set_forward(&mut self, seconds: i64) {
        set_clock_forward(seconds);
        self.0 += seconds;
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        set_clock_forward(-self.0);
    }
}

async fn fails_at_first(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    if message.payload().starts_with(b"again") && attempt.0 == 1 { Err(Failure::new("once")) } else { Ok(()) }
}

/// The clock is set an hour forward, two hours back, and right again, while a retry and a delayed message wait: neither
/// comes early nor late, and nothing is lost or taken for expired that has two hours left.
pub async fn clock_jumps(cx: Cx) {
    const WAIT: Duration = Duration::from_secs(2);
    const HOUR: i64 = 3600;
    let states = States::default();
    let bus = states.watched(cx.steady(cx.builder())).connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), fails_at_first);
    route.concurrency(4).policy(retry_every(WAIT, 5));
    let running = start(consumers).await;
    let delays = cx.capabilities().delayed_send.support.is_available();
    let mut clock = Clock(0);
    for (round, jump) in [HOUR, -2 * HOUR, HOUR].into_iter().enumerate() {
        let (again, later) = (format!("again {round}"), format!("later {round}"));
        publish(&queue, [again.clone()]).await;
        let expiring = Message::new(format!("expiring {round}")).expires_in(Duration::from_secs(2 * 3600));
        queue.send_message(expiring).await.expect("sent");
        let sent = Instant::now();
        if delays {
            queue.send_message(Message::new(later.clone()).deliver_in(WAIT)).await.expect("sent");
        }
        eventually(PATIENCE, || async { if log.of(&again).is_empty() { Err("not tried") } else { Ok(()) } }).await;
        clock.set_forward(jump);
        publish(&queue, bodies(10).map(|body| format!("{round} {body}"))).await;
        eventually(PATIENCE, || async {
            let tried = log.of(&again).len();
            if tried == 2 { Ok(()) } else { Err(format!("{again}: tried {tried} times after {:?}", sent.elapsed())) }
        })
        .await;
        let tries = log.of(&again);
        assert_wait(&again, tries[1].at - tries[0].at, WAIT);
        if delays {
            eventually(PATIENCE, || async { if log.of(&later).is_empty() { Err("not there") } else { Ok(()) } }).await;
            assert_wait(&later, log.of(&later)[0].at - sent, WAIT);
        }
        eventually(PATIENCE, || async {
            let plain = log.bodies().iter().filter(|body| body.starts_with(&format!("{round} "))).count();
            let expiring = log.of(&format!("expiring {round}")).len();
            if (plain, expiring) == (10, 1) { Ok(()) } else { Err(format!("{plain} of 10, {expiring} of 1")) }
        })
        .await;
    }
    let stats = running.stats(queue.address().name()).expect("it runs");
    assert_eq!((stats.dead_lettered, stats.dropped), (0, 0), "{stats:?}");
    assert_eq!(states.downs(), 0, "a clock is no connection: {states}");
    let accepted = 3 * (12 + usize::from(delays));
    cx.record(Figures { accepted, handled: log.len() - 3, health: states.to_string(), ..Figures::default() });
    assert_eq!(log.len(), accepted + 3, "each once, and one more time what failed: {:?}", log.bodies());
    running.stop().await.expect("stop");
    closes(&bus).await;
    leaves_no_task().await;
}

#[track_caller]
fn assert_wait(what: &str, waited: Duration, wanted: Duration) {
    // Brokers count in whole seconds and milliseconds, and are busy.
    let within = wanted - Duration::from_millis(200)..wanted + Duration::from_secs(30);
    assert!(within.contains(&waited), "{what} came after {waited:?}, wanted {wanted:?}");
}
