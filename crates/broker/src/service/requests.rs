//! The calls of commands and queries, and the management of channels, which is a query to a name of its own.

use std::sync::Arc;

use futures_util::StreamExt;
use polymq_kubemq_proto::{Request, Response, Subscribe, request::RequestType, subscribe::SubscribeType};
use tonic::Status;

use super::{Answers, admin};
use crate::{
    access::Caller,
    broker::Shared,
    names,
    refusal::Refusal,
    rules::{Action, Resource},
};

pub(super) async fn ask(shared: &Shared, caller: &Caller, request: Request) -> Result<Response, Status> {
    if request.channel == admin::CHANNEL && request.request_type_data() == RequestType::Query {
        return Ok(admin::answer(shared, caller, request).await);
    }
    let resource =
        if request.request_type_data() == RequestType::Command { Resource::Commands } else { Resource::Queries };
    let may = caller.may(Action::Write, resource, &request.client_id, &request.channel);
    may.map_err(|refusal| refusal.status())?;
    tokio::select! {
        answer = shared.requests.ask(request) => answer.map_err(|refusal| refusal.status()),
        () = shared.stopping.cancelled() => Err(Refusal::shutdown().status()),
    }
}

pub(super) fn subscribe(
    shared: &Arc<Shared>,
    caller: &Caller,
    subscribe: &Subscribe,
) -> Result<Answers<Request>, Status> {
    let listen = || {
        let (listeners, resource) = match subscribe.subscribe_type_data() {
            SubscribeType::Commands => (&shared.requests.commands, Resource::Commands),
            SubscribeType::Queries => (&shared.requests.queries, Resource::Queries),
            _ => return Err(Refusal::subscribe_type()),
        };
        if subscribe.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check(&subscribe.channel)?;
        names::check_client(&subscribe.client_id, &subscribe.group)?;
        caller.may(Action::Read, resource, &subscribe.client_id, &subscribe.channel)?;
        Ok(listeners.listen(&subscribe.channel, &subscribe.group))
    };
    let listening = listen().map_err(|refusal| refusal.status())?;
    let requests = futures_util::stream::unfold(listening, |mut listening| async move {
        listening.next().await.map(|request| (Ok(request), listening))
    });
    Ok(Box::pin(requests.take_until(shared.stopping.clone().cancelled_owned())))
}
