//! Steps over what polls gave: settling it, and asking what is left.

use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamRequestType as Poll};

use super::{STREAMS, model::Model};

impl Model {
    pub(super) async fn settle(
        &mut self,
        transaction: u8,
        kind: Poll,
        which: Option<u8>,
        twice: bool,
        target: Option<u8>,
    ) {
        self.settle_over(None, transaction, kind, which, twice, target).await;
    }

    /// Settles all of a poll, or those that the bits of `which` choose: over its own stream, another one, or one for this only.
    /// Success is not answered, so a question follows that is: the transaction's status.
    pub(super) async fn settle_over(
        &mut self,
        stream: Option<usize>,
        transaction: u8,
        kind: Poll,
        which: Option<u8>,
        twice: bool,
        target: Option<u8>,
    ) {
        if self.transactions.is_empty() {
            return;
        }
        let at = usize::from(transaction) % self.transactions.len();
        let mut transaction = self.transactions.swap_remove(at);
        let mut chosen: Vec<(i64, u64)> = transaction
            .held
            .iter()
            .enumerate()
            .filter(|(at, _)| which.is_none_or(|which| which >> (at % 8) & 1 == 1))
            .map(|(_, (sequence, body))| (*sequence, *body))
            .collect();
        let mut range: Vec<i64> = chosen.iter().map(|(sequence, _)| *sequence).collect();
        if twice {
            range.extend(range.clone());
        }
        if kind == Poll::CloseByClient && range.is_empty() {
            // Without sequences it closes the whole.
            chosen = transaction.held.clone().into_iter().collect();
        }
        let request = QueuesDownstreamRequest {
            request_id: "settle".into(),
            client_id: "fuzz".into(),
            request_type_data: kind.into(),
            ref_transaction_id: transaction.id.clone(),
            re_queue_channel: target.map(|target| self.queue(target)).unwrap_or_default(),
            sequence_range: range,
            ..QueuesDownstreamRequest::default()
        };
        let status = QueuesDownstreamRequest {
            request_id: "status".into(),
            request_type_data: Poll::TransactionStatus.into(),
            ..request.clone()
        };
        // From here on what it gives back may come with the answer to another poll.
        let stream = stream.unwrap_or(transaction.stream);
        let refused = if stream < STREAMS {
            self.request(stream, request).await;
            self.request(stream, status).await;
            None
        } else {
            let answers = self.client.queues_downstream(tokio_stream::once(request)).await.unwrap();
            let mut answers = answers.into_inner();
            let answer = answers.message().await.unwrap();
            assert!(answer.is_none() || answers.message().await.unwrap().is_none(), "one answer, and the end");
            self.request(transaction.stream, status).await;
            answer
        };
        let stream = if stream < STREAMS { stream } else { transaction.stream };
        let mut answer = match refused {
            Some(refused) => refused,
            None => self.answer(stream, &["settle", "status"]).await,
        };
        if answer.is_error {
            assert!(chosen.is_empty(), "{kind:?}: {}", answer.error);
            answer = self.answer(stream, &["settle", "status"]).await;
        } else {
            assert!(!chosen.is_empty(), "{kind:?} of nothing is refused");
        }
        assert_eq!(answer.ref_request_id, "status", "a settlement that succeeds has no answer");
        for (sequence, body) in chosen {
            transaction.held.remove(&sequence);
            match kind {
                Poll::AckAll | Poll::AckRange => self.finish(body),
                Poll::NAckAll | Poll::NAckRange => self.failed(body),
                _ => {}
            }
        }
        assert_eq!(answer.transaction_complete, transaction.held.is_empty(), "{kind:?}");
        if transaction.held.is_empty() {
            self.over.push(transaction.id);
        } else {
            self.transactions.push(transaction);
        }
    }

    /// What a transaction still holds, or whether it is over: every stream may ask.
    pub(super) async fn ask(&mut self, stream: usize, transaction: u8, over: bool, offsets: bool) {
        let at = usize::from(transaction);
        let (id, held) = if over {
            let Some(id) = self.over.get(at % self.over.len().max(1)) else { return };
            (id.clone(), None)
        } else {
            let Some(open) = self.transactions.get(at % self.transactions.len().max(1)) else { return };
            (open.id.clone(), Some(open.held.keys().copied().collect::<Vec<_>>()))
        };
        let kind = if offsets { Poll::ActiveOffsets } else { Poll::TransactionStatus };
        let request = QueuesDownstreamRequest {
            request_id: "ask".into(),
            client_id: "fuzz".into(),
            request_type_data: kind.into(),
            ref_transaction_id: id.clone(),
            ..QueuesDownstreamRequest::default()
        };
        self.request(stream, request).await;
        let answer = self.answer(stream, &["ask"]).await;
        assert_eq!((answer.request_type_data(), &answer.transaction_id), (kind, &id), "{answer:?}");
        if offsets {
            assert_eq!(answer.is_error, held.is_none(), "{answer:?}");
            assert_eq!(answer.active_offsets, held.unwrap_or_default(), "of what is held");
        } else {
            assert!(!answer.is_error, "{answer:?}");
            assert_eq!(answer.transaction_complete, held.is_none(), "{answer:?}");
        }
    }
}
