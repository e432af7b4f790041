//! Commands and queries, and who answers them.

use std::{
    collections::HashMap,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use polymq_broker::Broker;
use polymq_core::ErrorKind;
use polymq_kubemq::{Answered, Ask, Asked, InProcess, KubeMq, KubeMqConfig, Reply, RequestKind};
use polymq_kubemq_proto::{Response, Subscribe, kubemq_client::KubemqClient, subscribe::SubscribeType};
use tokio::time::{Instant, timeout};

use crate::{PATIENCE, SECOND, connect, start, start_again};

fn ask(channel: &str, timeout: Duration) -> Ask {
    Ask {
        channel: channel.into(),
        metadata: "what".into(),
        body: "body".into(),
        tags: HashMap::new(),
        timeout,
        cache: None,
    }
}

/// Of mission row G17: nobody answers, and the error does not come before its time.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_a_responder_times_out() {
    let (broker, client) = start().await;
    let asked = Instant::now();
    let error = client.command(ask("nobody", SECOND)).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
    assert!(asked.elapsed() >= SECOND, "after {:?}", asked.elapsed());
    client.ping().await.expect("the connection is as good as before");
    let cached = Ask { cache: Some(("k".into(), SECOND)), ..ask("nobody", SECOND) };
    assert_eq!(client.command(cached).await.expect_err("no cache").kind(), ErrorKind::InvalidInput);
    broker.stop().await;
}

/// Of mission row G17: it comes when the time is over and no later, be it that nobody listens or that nobody answers. The clock
/// stands but for what is waited for, so it tells the time that was asked for.
#[tokio::test(start_paused = true)]
async fn a_request_times_out_at_its_time() {
    let broker = Broker::builder().in_process().expect("a broker");
    let service: InProcess = Arc::new(move |request| broker.call(request).boxed());
    let client = KubeMq::in_process(KubeMqConfig::default(), service).await.expect("connect");
    let silent = |_| pending::<Result<Reply, String>>();
    let _commands = client.respond(RequestKind::Command, "silent", "", 10, silent).await.expect("listens");
    let _queries = client.respond(RequestKind::Query, "silent", "", 10, silent).await.expect("listens");
    for channel in ["nobody", "silent"] {
        for limit in [Duration::from_millis(300), 5 * SECOND, 90 * SECOND] {
            for kind in [RequestKind::Command, RequestKind::Query] {
                let asked = Instant::now();
                let answers = client.ask_many(kind, [ask(channel, limit)], 1).await;
                let error = answers.into_iter().next().expect("an answer").expect_err("nobody answers");
                assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
                assert!(error.to_string().contains("Error 301"), "the broker says it: {error}");
                // The clock of timers goes by milliseconds.
                let took = asked.elapsed().as_millis();
                let exactly = limit.as_millis()..=limit.as_millis() + 1;
                assert!(exactly.contains(&took), "{kind:?} of {channel}: {took} ms of {limit:?}");
            }
        }
    }
}

/// Answers with what was asked, the metadata and a tag.
async fn echo(asked: Asked) -> Result<Reply, String> {
    assert_eq!(asked.metadata, "what");
    Ok(Reply { metadata: "why".into(), body: asked.body, tags: HashMap::from([("a".into(), "1".into())]) })
}

/// Mission row G17: an error is told at once, a success is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_hears_of_its_responders_outcome_at_once() {
    let (broker, client) = start().await;
    let _good = client.respond(RequestKind::Command, "good", "", 1, echo).await.expect("listens");
    let fails = |_| async { Err::<Reply, _>("the shop is closed") };
    let _bad = client.respond(RequestKind::Command, "bad", "", 1, fails).await.expect("listens");
    let done = client.command(ask("good", 30 * SECOND)).await.expect("answered");
    assert!(done.executed && done.error.is_empty() && done.tags["a"] == "1", "{done:?}");
    assert!(done.body.is_empty() && done.metadata.is_empty(), "commands carry no data back: {done:?}");
    let asked = Instant::now();
    let failed = client.command(ask("bad", 30 * SECOND)).await.expect("answered");
    assert_eq!((failed.executed, &*failed.error), (false, "the shop is closed"));
    assert!(asked.elapsed() < 25 * SECOND, "after {:?}", asked.elapsed());
    broker.stop().await;
}

/// Mission row G18.
#[tokio::test(flavor = "multi_thread")]
async fn a_query_brings_body_metadata_and_tags() {
    let (broker, client) = start().await;
    let _responder = client.respond(RequestKind::Query, "q", "", 4, echo).await.expect("listens");
    let expected = Answered {
        executed: true,
        error: String::new(),
        metadata: "why".into(),
        body: "body".into(),
        tags: HashMap::from([("a".into(), "1".into())]),
        from_cache: false,
    };
    assert_eq!(client.query(ask("q", 30 * SECOND)).await.expect("answered"), expected);
    broker.stop().await;
}

/// Mission row G19: inside its time the broker answers, and another channel's key is another key.
#[tokio::test(flavor = "multi_thread")]
async fn a_query_is_answered_from_the_cache() {
    let (broker, client) = start().await;
    let calls = Arc::new(AtomicUsize::new(0));
    let mut responders = Vec::new();
    for channel in ["a", "b"] {
        let calls = Arc::clone(&calls);
        let count = move |_| {
            let n = calls.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, String>(Reply { body: format!("{channel}{n}").into(), ..Reply::default() }) }
        };
        responders.push(client.respond(RequestKind::Query, channel, "", 1, count).await.expect("listens"));
    }
    let cached = |channel| Ask { cache: Some(("key".into(), 60 * SECOND)), ..ask(channel, 30 * SECOND) };
    for (channel, body, hit) in [("a", "a0", false), ("a", "a0", true), ("b", "b1", false), ("b", "b1", true)] {
        let answer = client.query(cached(channel)).await.expect("answered");
        assert_eq!((&*answer.body, answer.from_cache), (body.as_bytes(), hit));
    }
    let fresh = client.query(ask("a", 30 * SECOND)).await.expect("answered");
    assert_eq!((&*fresh.body, fresh.from_cache), (&b"a2"[..], false), "without a key nothing is cached");
    broker.stop().await;
}

/// Mission row G19: what a responder says of the cache does not reach who asked, not even over the bare protocol.
#[tokio::test(flavor = "multi_thread")]
async fn a_responder_cannot_claim_a_cache_hit() {
    let (broker, client) = start().await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", broker.address())).expect("a URL");
    let mut bare = KubemqClient::new(endpoint.connect().await.expect("connect"));
    let subscribe = Subscribe {
        subscribe_type_data: SubscribeType::Queries.into(),
        client_id: "liar".into(),
        channel: "q".into(),
        ..Subscribe::default()
    };
    let mut requests = bare.subscribe_to_requests(subscribe).await.expect("listens").into_inner();
    let lies = async {
        let request = requests.message().await.expect("a stream").expect("a request");
        let response = Response {
            client_id: "liar".into(),
            request_id: request.request_id,
            reply_channel: request.reply_channel,
            body: "x".into(),
            cache_hit: true,
            executed: true,
            ..Response::default()
        };
        bare.send_response(response).await.expect("taken");
    };
    let (answer, ()) = tokio::join!(client.query(ask("q", 30 * SECOND)), lies);
    let answer = answer.expect("answered");
    assert_eq!((&*answer.body, answer.from_cache), (&b"x"[..], false));
    drop(requests);
    broker.stop().await;
}

/// Mission row G20: each request is answered by one of a group.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_responders_shares_requests() {
    let (broker, client) = start().await;
    let other = connect(&broker).await;
    let calls = Arc::new(AtomicUsize::new(0));
    let mut responders = Vec::new();
    for client in [&client, &other] {
        let calls = Arc::clone(&calls);
        let count = move |asked| {
            calls.fetch_add(1, Ordering::SeqCst);
            echo(asked)
        };
        responders.push(client.respond(RequestKind::Command, "c", "group", 2, count).await.expect("listens"));
    }
    for answer in client.ask_many(RequestKind::Command, vec![ask("c", 30 * SECOND); 40], 8).await {
        assert!(answer.expect("answered").executed);
    }
    for responder in responders {
        responder.stop().await;
    }
    assert_eq!(calls.load(Ordering::SeqCst), 40);
    broker.stop().await;
}

/// Mission row G21: who asked a handler that panics hears of it before its time is over, and the responder goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_responder_that_panics_answers_an_error_at_once() {
    let (broker, client) = start().await;
    let panics = |asked: Asked| async move {
        assert!(asked.body != "bad", "a secret");
        echo(asked).await
    };
    let _responder = client.respond(RequestKind::Query, "q", "", 1, panics).await.expect("listens");
    let asked = Instant::now();
    let failed = client.query(Ask { body: "bad".into(), ..ask("q", 30 * SECOND) }).await.expect("answered");
    assert_eq!((failed.executed, &*failed.error), (false, "the handler panicked"));
    assert!(asked.elapsed() < 25 * SECOND, "after {:?}", asked.elapsed());
    assert!(client.query(ask("q", 30 * SECOND)).await.expect("answered").executed, "the next one is handled");
    broker.stop().await;
}

/// Mission row G23: 200 requests, 20 at a time, one of which fails.
#[tokio::test(flavor = "multi_thread")]
async fn many_requests_run_within_a_limit_and_are_answered_in_order() {
    let (broker, client) = start().await;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let handler = {
        let (running, most) = (Arc::clone(&running), Arc::clone(&most));
        move |asked: Asked| {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let running = Arc::clone(&running);
            async move {
                // Later ones are ready first.
                for _ in 0..asked.body.len() % 7 {
                    tokio::task::yield_now().await;
                }
                running.fetch_sub(1, Ordering::SeqCst);
                if asked.body == "77" { Err("no 77") } else { Ok(Reply { body: asked.body, ..Reply::default() }) }
            }
        }
    };
    let _responder = client.respond(RequestKind::Query, "q", "", 100, handler).await.expect("listens");
    let asks = (0..200).map(|n| Ask { body: n.to_string().into(), ..ask("q", 30 * SECOND) });
    let answers = client.ask_many(RequestKind::Query, asks, 20).await;
    assert_eq!(answers.len(), 200);
    for (n, answer) in answers.into_iter().enumerate() {
        let answer = answer.expect("answered");
        match n {
            77 => assert_eq!((answer.executed, &*answer.error), (false, "no 77")),
            _ => assert_eq!((answer.executed, &*answer.body), (true, n.to_string().as_bytes())),
        }
    }
    let most = most.load(Ordering::SeqCst);
    assert!((1..=20).contains(&most), "{most} at a time");
    broker.stop().await;
}

/// Of mission row G20: a responder is there again when the broker is.
#[tokio::test(flavor = "multi_thread")]
async fn a_responder_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let broker = start_again(folder.path(), &format!("127.0.0.1:{}", polymq_testkit::free_port())).await;
    let address = broker.address().to_string();
    let client = connect(&broker).await;
    let responder = client.respond(RequestKind::Command, "c", "", 1, echo).await.expect("listens");
    assert!(client.command(ask("c", 30 * SECOND)).await.expect("answered").executed);
    broker.stop().await;
    let broker = start_again(folder.path(), &address).await;
    let other = connect(&broker).await;
    // Asked before it is there again, a command gets no answer.
    let asking = async {
        loop {
            if let Ok(answer) = other.command(ask("c", SECOND / 5)).await {
                return answer;
            }
        }
    };
    assert!(timeout(60 * SECOND, asking).await.expect("in time").executed);
    responder.stop().await;
    broker.stop().await;
}

/// Mission row G27: a responder that is dropped ends with what it had begun, and its sibling goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_responder_leaves_its_sibling() {
    let (broker, client) = start().await;
    let (begun, started) = tokio::sync::oneshot::channel();
    let begun = Arc::new(std::sync::Mutex::new(Some(begun)));
    let cancelled = Arc::new(());
    let witness = Arc::downgrade(&cancelled);
    let hangs = move |_| {
        let (begun, cancelled) = (Arc::clone(&begun), Arc::clone(&cancelled));
        async move {
            let _cancelled = cancelled;
            if let Some(begun) = begun.lock().expect("a lock").take() {
                begun.send(()).expect("somebody waits");
            }
            pending::<Result<Reply, String>>().await
        }
    };
    let hanging = client.respond(RequestKind::Command, "hangs", "", 1, hangs).await.expect("listens");
    let _sibling = client.respond(RequestKind::Command, "c", "", 1, echo).await.expect("listens");
    let asking = client.command(ask("hangs", 10 * SECOND));
    let dropping = async {
        timeout(2 * PATIENCE, started).await.expect("in time").expect("begun");
        drop(hanging);
        while witness.upgrade().is_some() {
            tokio::task::yield_now().await;
        }
    };
    let (unanswered, ()) = tokio::join!(asking, dropping);
    assert_eq!(unanswered.expect_err("cancelled").kind(), ErrorKind::UnknownOutcome);
    assert!(client.command(ask("c", 30 * SECOND)).await.expect("answered").executed);
    broker.stop().await;
}
