//! The watch over the other side: when it counts as lost, what becomes of those who wait, and how it is found again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Error, ErrorKind, HealthState, Result, Retry,
    watch::{Peer, Terms, Watch},
};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

/// What the other side does next; without a word it answers.
#[derive(Debug, Clone, Copy)]
enum Mood {
    Answers,
    Silent,
    Fails(ErrorKind),
}

#[derive(Debug, Default)]
struct Script {
    connects: Mutex<VecDeque<Mood>>,
    asks: Mutex<VecDeque<Mood>>,
    /// When it was connected to, since the beginning.
    at: Mutex<Vec<Duration>>,
}

#[derive(Debug)]
struct Other(Arc<Script>, Instant);

async fn act(moods: &Mutex<VecDeque<Mood>>) -> Result<()> {
    let mood = moods.lock().expect("not poisoned").pop_front();
    match mood.unwrap_or(Mood::Answers) {
        Mood::Answers => Ok(()),
        Mood::Silent => std::future::pending().await,
        Mood::Fails(kind) => Err(Error::new(kind, "as the test wants")),
    }
}

#[async_trait]
impl Peer for Other {
    type Live = u64;
    type Answer = ();

    fn backend(&self) -> &'static str {
        "other"
    }

    async fn connect(&self, generation: u64) -> Result<u64> {
        self.0.at.lock().expect("not poisoned").push(self.1.elapsed());
        act(&self.0.connects).await.map(|()| generation)
    }

    async fn ask(&self, _: &u64) -> Result<()> {
        act(&self.0.asks).await
    }

    fn is_loss(&self, error: &Error) -> bool {
        matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Unauthenticated)
    }

    fn is_silence(&self, error: &Error) -> bool {
        error.kind() != ErrorKind::Unauthenticated
    }
}

const TERMS: Terms = Terms {
    heartbeat: Duration::from_secs(10),
    connect_timeout: Duration::from_secs(5),
    connect_retry: false,
    reconnect_initial: SECOND,
    reconnect_max: Duration::from_secs(4),
    reconnect_limit: 0,
};

async fn start(connects: &[Mood], asks: &[Mood], terms: Terms) -> Result<(Arc<Watch<Other>>, Arc<Script>)> {
    let (connects, asks) = (connects.iter().copied().collect(), asks.iter().copied().collect());
    let script = Arc::new(Script { connects: Mutex::new(connects), asks: Mutex::new(asks), at: Mutex::default() });
    let watch = Watch::start(Other(Arc::clone(&script), Instant::now()), terms).await?;
    Ok((watch, script))
}

fn lost() -> Error {
    Error::new(ErrorKind::Disconnected, "the wire was cut")
}

const DOWN: Mood = Mood::Fails(ErrorKind::Disconnected);

#[tokio::test(start_paused = true)]
async fn a_loss_ends_what_is_on_its_way_and_everybody_waits_for_the_next_connection() {
    let moods = [Mood::Answers, DOWN, DOWN, DOWN, DOWN];
    let (watch, script) = start(&moods, &[], TERMS).await.expect("connected");
    let first = watch.live().await.expect("there");
    let waits = watch.unless_over(&first, std::future::pending::<Result<()>>());
    let (on_its_way, next) = tokio::join!(waits, async {
        let failed = watch.unless_over(&first, async { Err::<(), _>(lost()) }).await;
        assert_eq!(failed.expect("answered").expect_err("failed").kind(), ErrorKind::Disconnected);
        assert!(!watch.is_up() && watch.live_now().is_none());
        assert_eq!(&*watch.reason(), "the wire was cut");
        assert_eq!(watch.health().now().state, HealthState::Down);
        watch.live().await.expect("found again")
    });
    assert!(on_its_way.is_none(), "no answer can come any more");
    assert_eq!((*first, *next, watch.health().now().reconnects), (1, 2, 1));
    // The old connection has nothing more to say.
    watch.failed(&first, &lost());
    assert!(watch.is_up());
    // Each pause is at most twice the one before and at least half of that, up to the longest.
    let at = script.at.lock().expect("not poisoned").clone();
    assert_eq!(at.len(), 6);
    for (pause, most) in at.windows(2).map(|two| two[1] - two[0]).zip([1, 2, 4, 4, 4]) {
        assert!(pause >= SECOND * most / 2 && pause <= SECOND * most + SECOND / 100, "{pause:?} of {most} s: {at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_silent_is_asked_and_lost_without_an_answer() {
    let (watch, _) = start(&[], &[Mood::Answers, Mood::Silent], TERMS).await.expect("connected");
    let live = watch.live().await.expect("there");
    let began = Instant::now();
    watch.over(&live).await;
    // Asked after ten seconds and answered; asked after ten more, and ten more without a word.
    let silence = began.elapsed();
    assert!(silence >= SECOND * 30 && silence < SECOND * 31, "{silence:?}");

    let (watch, _) = start(&[], &[Mood::Silent], TERMS).await.expect("connected");
    let live = watch.live().await.expect("there");
    for _ in 0..20 {
        tokio::time::sleep(5 * SECOND).await;
        watch.answered();
    }
    assert!(tokio::time::timeout(SECOND, watch.over(&live)).await.is_err(), "who is heard is not asked");
}

#[tokio::test(start_paused = true)]
async fn refused_credentials_do_not_end_what_is_on_its_way() {
    let (watch, _) = start(&[], &[], TERMS).await.expect("connected");
    let live = watch.live().await.expect("there");
    let slow = async {
        tokio::time::sleep(3 * SECOND).await;
        Ok(7)
    };
    let (answer, ()) = tokio::join!(watch.unless_over(&live, slow), async {
        watch.failed(&live, &Error::new(ErrorKind::Unauthenticated, "expired"));
        assert!(!watch.is_up());
    });
    assert_eq!(answer.expect("not given up").expect("answered"), 7);
    assert!(watch.is_up(), "new credentials were found meanwhile");
}

#[tokio::test(start_paused = true)]
async fn it_gives_up_at_the_limit_and_closed_is_final() {
    let terms = Terms { reconnect_limit: 3, ..TERMS };
    let (watch, script) = start(&[Mood::Answers, DOWN, DOWN, DOWN], &[], terms).await.expect("connected");
    let live = watch.live().await.expect("there");
    watch.failed(&live, &lost());
    let error = watch.live_soon("send").await.expect_err("there will be none any more");
    watch.closed().await;
    let expected = ["given up after 3 attempts: as the test wants", "closed by the test"];
    // Who did not close it is not told that it was closed.
    let told = |error: Error| {
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Never), "{error:?}");
        assert!(error.message().contains(expected[0]), "{error}");
    };
    told(watch.live().await.expect_err("there will be none any more"));
    told(watch.ended("receive"));
    assert_eq!(watch.health().now().reason.as_deref(), Some(expected[0]));
    assert_eq!((error.backend(), error.operation()), (Some("other"), Some("send")));
    watch.close(expected[1]);
    tokio::time::sleep(60 * SECOND).await;
    assert_eq!(&*watch.reason(), expected[0], "the first reason stays");
    assert_eq!(script.at.lock().expect("not poisoned").len(), 4, "nobody tries any more");
    told(watch.ping().await.expect_err("given up"));

    let (watch, _) = start(&[], &[], TERMS).await.expect("connected");
    watch.close(expected[1]);
    assert_eq!(watch.ping().await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(watch.ended("receive").kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn the_first_failure_is_the_callers_unless_it_is_to_be_tried_again() {
    let error = start(&[DOWN], &[], TERMS).await.expect_err("the caller's");
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    let patient = Terms { connect_retry: true, ..TERMS };
    let (watch, _) = start(&[DOWN, DOWN], &[], patient).await.expect("goes on");
    assert_eq!(*watch.live().await.expect("there at last"), 2);
    let wrong = Mood::Fails(ErrorKind::Config);
    assert_eq!(start(&[wrong], &[], patient).await.expect_err("final").kind(), ErrorKind::Config);
}
