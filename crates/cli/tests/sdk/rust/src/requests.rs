//! Commands and queries.

use std::{pin::Pin, time::Duration};

use kubemq::{Command, CommandReply, KubemqClient, Query, QueryReply, Subscription};
use tokio::time::{Instant, sleep};

use crate::{Seen, client, until};

crate::cases! { commands command_timeout queries query_timeout query_cache request_groups request_channels }

type Done = Pin<Box<dyn Future<Output = ()> + Send>>;

fn command(body: &str, timeout: Duration) -> Command {
    let command = Command::builder().channel("ask").metadata("about").add_tag("key", "value");
    command.body(body.as_bytes().to_vec()).timeout(timeout).build()
}

fn query(body: &str, timeout: Duration) -> kubemq::QueryBuilder {
    let query = Query::builder().channel("ask").metadata("about").add_tag("key", "value");
    query.body(body.as_bytes().to_vec()).timeout(timeout)
}

const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(30);

/// Answers commands; "bad" ones with an error. Ready when it returns.
async fn answer_commands(client: &KubemqClient, group: &str) -> (Subscription, Seen) {
    let (answers, seen) = (client.clone(), Seen::default());
    let told = seen.clone();
    let on_command = move |command: kubemq::CommandReceive| -> Done {
        told.add(&command.body);
        let answers = answers.clone();
        Box::pin(async move {
            let reply = CommandReply::builder().request_id(&command.id).response_to(&command.response_to);
            let reply = if command.body == b"bad" { reply.error("no") } else { reply };
            answers.send_command_response(reply.build()).await.expect("an answer");
        })
    };
    let subscription = client.subscribe_to_commands("ask", group, on_command, None).await.expect("a subscription");
    until("the responder", async || client.send_command(command("probe", SHORT)).await.is_ok() && seen.any()).await;
    (subscription, seen)
}

/// Answers queries with what `body` makes of the number of queries so far. Ready when it returns.
async fn answer_queries(client: &KubemqClient, slow: Duration) -> (Subscription, Seen) {
    let (answers, seen) = (client.clone(), Seen::default());
    let told = seen.clone();
    let on_query = move |query: kubemq::QueryReceive| -> Done {
        told.add(&query.body);
        let (answers, number) = (answers.clone(), told.bodies().len());
        Box::pin(async move {
            if query.body != b"probe" {
                sleep(slow).await;
            }
            let reply = QueryReply::builder().request_id(&query.id).response_to(&query.response_to);
            let reply = reply.metadata("answered").body(format!("answer {number}").into_bytes());
            // Nobody waits for a late one, and that is no error.
            answers.send_query_response(reply.build()).await.expect("an answer");
        })
    };
    let subscription = client.subscribe_to_queries("ask", "", on_query, None).await.expect("a subscription");
    until("the responder", async || client.send_query(query("probe", SHORT).build()).await.is_ok()).await;
    (subscription, seen)
}

async fn commands() {
    let client = client("rust").await;
    let (_subscription, seen) = answer_commands(&client, "").await;
    let good = client.send_command(command("good", LONG)).await.expect("an answer");
    assert_eq!((good.executed, &*good.error, &*good.response_client_id), (true, "", "rust"));
    let bad = client.send_command(command("bad", LONG)).await.expect("an answer");
    assert_eq!((bad.executed, &*bad.error), (false, "no"));
    assert_eq!(seen.bodies(), ["good", "bad"]);
}

async fn command_timeout() {
    let (client, start) = (client("rust").await, Instant::now());
    let refused = client.send_command(command("nobody", SHORT)).await.expect_err("nobody is there");
    assert!(refused.to_string().contains("Error 301"), "{refused}");
    assert!(start.elapsed() >= SHORT, "after the time-out, not before");
}

async fn queries() {
    let client = client("rust").await;
    let _responder = answer_queries(&client, Duration::ZERO).await;
    let found = client.send_query(query("question", LONG).build()).await.expect("an answer");
    assert_eq!((found.executed, &*found.body, &*found.metadata), (true, &b"answer 1"[..], "answered"), "{found:?}");
    assert!(!found.cache_hit, "{found:?}");
}

async fn query_timeout() {
    let client = client("rust").await;
    let _responder = answer_queries(&client, Duration::from_secs(12)).await;
    let refused = client.send_query(query("question", SHORT).build()).await.expect_err("too late");
    assert!(refused.to_string().contains("Error 301"), "{refused}");
}

async fn query_cache() {
    let client = client("rust").await;
    let (_subscription, seen) = answer_queries(&client, Duration::ZERO).await;
    let ask = async |key: &str| {
        let query = query("question", LONG).cache_key(key).cache_ttl(Duration::from_secs(30));
        let found = client.send_query(query.build()).await.expect("an answer");
        (found.cache_hit, String::from_utf8_lossy(&found.body).into_owned())
    };
    assert_eq!(ask("k").await, (false, "answer 1".into()));
    assert_eq!(ask("k").await, (true, "answer 1".into()));
    assert_eq!(ask("other").await, (false, "answer 2".into()));
    sleep(Duration::from_secs(31)).await;
    assert_eq!(ask("k").await, (false, "answer 3".into()), "its time is over");
    assert_eq!(seen.bodies().len(), 3);
}

async fn request_groups() {
    let (one, other) = (client("one").await, client("other").await);
    let (_one, first) = answer_commands(&one, "workers").await;
    let (_other, second) = answer_commands(&other, "workers").await;
    for number in 0..20 {
        let done = one.send_command(command(&number.to_string(), LONG)).await.expect("an answer");
        assert!(done.executed, "{done:?}");
    }
    assert_eq!(first.bodies().len() + second.bodies().len(), 20, "each command to one of the group");
}

async fn request_channels() {
    let client = client("rust").await;
    client.create_commands_channel("do").await.expect("a channel");
    client.create_queries_channel("ask").await.expect("a channel");
    let names = |found: Vec<kubemq::ChannelInfo>| found.into_iter().map(|channel| channel.name).collect::<Vec<_>>();
    assert_eq!(names(client.list_commands_channels("").await.expect("a list")), ["do"]);
    assert_eq!(names(client.list_queries_channels("").await.expect("a list")), ["ask"]);
    client.delete_commands_channel("do").await.expect("a deletion");
    client.delete_queries_channel("ask").await.expect("a deletion");
    assert!(client.list_commands_channels("").await.expect("a list").is_empty());
}
