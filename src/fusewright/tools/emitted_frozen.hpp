// ======== frozen: no gradients

{type} frozen_autograd({parameters}) {{
    fusewright_frozen_check({names});
    TORCH_CHECK(!at::GradMode::is_enabled() || !({any_grad}),
                "the model is frozen, so what is made of its parameters is kept, and a call cannot have gradients: "
                "call it under torch.no_grad(), or call its method thaw() to train it");
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_frozen)>("FUSEWRIGHT_NAMESPACE::frozen");
    return run.call({names});
}}
