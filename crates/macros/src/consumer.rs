//! `#[consumer]`: keeps the function and submits the call of `route` that a user would write.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::{
    Error, Expr, FnArg, ItemFn, Path, Result, Token, Type,
    parse::{ParseStream, Parser},
    spanned::Spanned,
};

use crate::options::{Options, Problems, check_text};

const KNOWN: &[&str] = &[
    "group",
    "broadcast",
    "kind",
    "version",
    "concurrency",
    "batch",
    "blocking",
    "timeout",
    "prefetch",
    "ordered_by_key",
    "existing",
    "attempts",
    "retry",
    "dead_letters",
    "policy",
    "ack",
    "with",
    "crate",
];

/// The most arguments that a handler can have.
const MOST_ARGUMENTS: usize = 8;

pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    let registered = syn::parse2::<ItemFn>(item.clone())
        .map_err(|error| Error::new(error.span(), "#[consumer] goes on a function: async fn handle(order: Order)"))
        .and_then(|function| register(options, &function));
    match registered {
        Ok(registration) => quote!(#item #registration),
        // The function stays, so that its other uses are no errors too.
        Err(error) => {
            let error = error.to_compile_error();
            quote!(#item #error)
        }
    }
}

fn register(options: TokenStream, function: &ItemFn) -> Result<TokenStream> {
    let mut problems = Problems::default();
    let parsed = problems.take(parse.parse2(options));
    let blocking = parsed.as_ref().and_then(|(_, options)| options.flag("blocking").ok()).unwrap_or(false);
    let batch = parsed.as_ref().is_some_and(|(_, options)| options.span("batch").is_some());
    check_function(function, blocking, batch, &mut problems);
    let calls = parsed.and_then(|(channel, options)| {
        let calls = problems.take(calls(&options));
        Some((channel, calls?))
    });
    problems.into_result()?;
    let Some((channel, Calls { krate, batch, route })) = calls else { return Ok(TokenStream::new()) };

    let name = &function.sig.ident;
    let text = name.to_string();
    // Errors point at the function; names resolve here, whichever macro the function came from.
    let span = Span::call_site().located_at(name.span());
    let handler = if blocking { quote_spanned!(span=> #krate::blocking(#name)) } else { name.to_token_stream() };
    let start = match &batch {
        Some(max) => quote_spanned!(span=> factory.route_batch(#channel, #max, #handler)),
        None => quote_spanned!(span=> factory.route(#channel, #handler)),
    };
    let conditions = function.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    // Errors about an argument point at its type instead of at the whole function.
    let arguments = if batch.is_some() { Vec::new() } else { argument_types(function) };
    let checks = arguments.iter().map(|ty| {
        let span = Span::call_site().located_at(ty.span());
        quote_spanned!(span=> argument::<#ty>();)
    });
    let check = (!arguments.is_empty()).then(|| {
        quote! {
            fn argument<T: #krate::FromDelivery>() {}
            let _ = || { #(#checks)* };
        }
    });
    Ok(quote! {
        #(#conditions)*
        const _: () = {
            #krate::__private::inventory::submit! {
                #krate::ConsumerEntry {
                    name: ::core::concat!(::core::module_path!(), "::", #text),
                    register: |factory: &mut #krate::ConsumerFactory| {
                        #check
                        let _ = #start #(#route)*;
                    },
                }
            }
        };
    })
}

/// The channel's name, then the options.
fn parse(input: ParseStream<'_>) -> Result<(Expr, Options)> {
    let missing = "name the queue or topic first: #[consumer(\"orders\")]";
    if input.is_empty() {
        return Err(Error::new(Span::call_site(), missing));
    }
    let named = input.peek(syn::Ident) && (input.peek2(Token![=]) && !input.peek2(Token![==]));
    if named || input.peek(Token![crate]) && input.peek2(Token![=]) {
        return Err(Error::new(input.span(), missing));
    }
    let channel: Expr = input.parse()?;
    check_text(&channel, || missing.to_owned(), "the name of the channel")?;
    if !input.is_empty() {
        input.parse::<Token![,]>()?;
    }
    Ok((channel, Options::parse(input, KNOWN, &["with"])?))
}

/// What is called on the factory and on the route.
struct Calls {
    krate: Path,
    batch: Option<TokenStream>,
    route: Vec<TokenStream>,
}

fn calls(options: &Options) -> Result<Calls> {
    let krate = options.krate()?;
    let mut problems = Problems::default();
    let mut route = Vec::new();
    let exclusive = |one: &str, other: &str, fix: &str| match (options.span(one), options.span(other)) {
        (Some(_), Some(span)) => Err(Error::new(span, format!("`{one}` and `{other}` exclude each other: {fix}"))),
        _ => Ok(()),
    };
    problems.take(exclusive(
        "group",
        "broadcast",
        "a group shares the messages, broadcast gives each process all of them",
    ));
    problems.take(exclusive("batch", "blocking", "a function of batches is async"));
    problems.take(exclusive("policy", "attempts", "set max_attempts in the policy"));
    problems.take(exclusive("policy", "retry", "set mode in the policy"));
    problems.take(exclusive("policy", "dead_letters", "set dead_letters in the policy"));

    let mut call = |method: &str, argument: Option<TokenStream>, span: Span| {
        let method = syn::Ident::new(method, span);
        route.push(quote_spanned!(span=> .#method(#argument)));
    };
    for (name, example) in [("group", "audit"), ("kind", "order.created")] {
        if let Some(Some(text)) = problems.take(options.text(name, example)) {
            call(name, Some(text.to_token_stream()), text.span());
        }
    }
    for (name, example) in [("version", "2"), ("concurrency", "8"), ("prefetch", "50")] {
        if let Some(Some(number)) = problems.take(options.number(name, example)) {
            call(name, Some(number.to_token_stream()), number.span());
        }
    }
    for name in ["broadcast", "ordered_by_key", "existing"] {
        if problems.take(options.flag(name)) == Some(true) {
            call(name, None, options.span(name).unwrap_or_else(Span::call_site));
        }
    }
    problems.take(options.flag("blocking"));
    if let Some(Some(limit)) = problems.take(duration(options)) {
        call("timeout", Some(limit), Span::call_site());
    }
    if let Some(Some(mode)) = problems.take(choice(options, "ack", ACK_MODES)) {
        let mode = syn::Ident::new(mode, Span::call_site());
        call("ack_mode", Some(quote!(#krate::AckMode::#mode)), Span::call_site());
    }
    if let Some(Some(policy)) = problems.take(policy(options, &krate)) {
        call("policy", Some(policy), Span::call_site());
    }
    for pair in problems.take(options.lists("with", 2, "with(\"key\", \"value\")")).unwrap_or_default() {
        call("with", Some(quote!(#(#pair),*)), Span::call_site());
    }
    let batch = problems.take(options.number("batch", "128")).flatten().map(ToTokens::to_token_stream);
    problems.into_result()?;
    Ok(Calls { krate, batch, route })
}

const ACK_MODES: &[(&str, &str)] =
    &[("after_success", "AfterSuccess"), ("on_receipt", "OnReceipt"), ("always", "Always")];
const RETRY_MODES: &[(&str, &str)] = &[("in_place", "InPlace"), ("redeliver", "Redeliver")];

/// One of a few words.
fn choice(
    options: &Options,
    name: &str,
    choices: &'static [(&'static str, &'static str)],
) -> Result<Option<&'static str>> {
    let words: Vec<String> = choices.iter().map(|(word, _)| format!("{word:?}")).collect();
    let expected = format!("one of {}", words.join(", "));
    let Some(given) = options.literal(name, &expected)? else { return Ok(None) };
    match choices.iter().find(|(word, _)| *word == given.value()) {
        Some((_, variant)) => Ok(Some(variant)),
        None => Err(Error::new(given.span(), format!("`{name}` needs {expected}"))),
    }
}

fn duration(options: &Options) -> Result<Option<TokenStream>> {
    let expected = "a duration with its unit: timeout = \"5s\", \"250ms\" or \"2m\"";
    let Some(text) = options.literal("timeout", expected)? else { return Ok(None) };
    match humantime::parse_duration(&text.value()) {
        Ok(limit) if !limit.is_zero() => {
            let (seconds, nanos) = (limit.as_secs(), limit.subsec_nanos());
            Ok(Some(quote!(::core::time::Duration::new(#seconds, #nanos))))
        }
        Ok(_) => {
            Err(Error::new(text.span(), "a `timeout` of nothing would cancel every attempt; leave it out for no limit"))
        }
        Err(_) => Err(Error::new(text.span(), format!("`timeout` needs {expected}"))),
    }
}

fn policy(options: &Options, krate: &Path) -> Result<Option<TokenStream>> {
    if let Some(policy) = options.any("policy", "my_policy()")? {
        return Ok(Some(policy.to_token_stream()));
    }
    let mut fields = Vec::new();
    if let Some(attempts) = options.number("attempts", "3")? {
        fields.push(quote!(max_attempts: #attempts));
    }
    if let Some(mode) = choice(options, "retry", RETRY_MODES)? {
        if let (Some(_), "Redeliver") = (options.span("ordered_by_key"), mode) {
            let span = options.span("retry").unwrap_or_else(Span::call_site);
            return Err(Error::new(
                span,
                "`ordered_by_key` retries in place: a message that is sent again loses its place",
            ));
        }
        let mode = syn::Ident::new(mode, Span::call_site());
        fields.push(quote!(mode: #krate::RetryMode::#mode));
    }
    if let Some(queue) = options.text("dead_letters", "orders.failed")? {
        fields.push(quote!(dead_letters: #krate::DeadLetters::To(#krate::Address::queue(#queue))));
    }
    if fields.is_empty() {
        return Ok(None);
    }
    Ok(Some(quote!(#krate::FailurePolicy { #(#fields,)* ..::core::default::Default::default() })))
}

fn check_function(function: &ItemFn, blocking: bool, batch: bool, problems: &mut Problems) {
    let signature = &function.sig;
    match (signature.asyncness, blocking) {
        (None, false) => problems.at(
            signature.fn_token,
            "a handler is an async fn: write `async fn`, or add the option `blocking` for a function that blocks",
        ),
        (Some(asyncness), true) => {
            problems.at(asyncness, "`blocking` is for ordinary functions: remove `async` or the option");
        }
        _ => {}
    }
    if let Some(unsafety) = signature.unsafety {
        problems.at(unsafety, "a handler cannot be unsafe: whoever calls it could not keep its conditions");
    }
    if !signature.generics.params.is_empty() {
        problems.at(
            &signature.generics,
            "a handler has no generic parameters: register a concrete type by hand with ConsumerFactory::route",
        );
    }
    for argument in &signature.inputs {
        match argument {
            FnArg::Receiver(receiver) => problems.at(
                receiver,
                "a handler is a free function without `self`: take what it needs as State<T> and give it with ConsumerFactory::state",
            ),
            FnArg::Typed(typed) => match &*typed.ty {
                Type::Reference(reference) => problems.at(
                    reference,
                    "a handler owns its arguments: take String instead of &str, Vec<u8> instead of &[u8], T instead of &T",
                ),
                Type::ImplTrait(ty) => problems.at(ty, "an argument of a handler has a concrete type, so that it can be extracted"),
                _ => {}
            },
        }
    }
    if batch && signature.inputs.len() != 1 {
        problems.at(&signature.ident, "a function of batches has one argument: Batch<T>");
    } else if signature.inputs.len() > MOST_ARGUMENTS {
        problems.at(
            &signature.ident,
            "a handler has at most eight arguments: put several into one type that implements FromDelivery",
        );
    }
}

fn argument_types(function: &ItemFn) -> Vec<&Type> {
    let typed = function.sig.inputs.iter().filter_map(|argument| match argument {
        FnArg::Typed(typed) => Some(&*typed.ty),
        FnArg::Receiver(_) => None,
    });
    typed.collect()
}
