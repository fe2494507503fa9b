"""The mathematics of diffusion, in torch alone: no model, no file, no config, no hidden randomness.

Glossary: one symbol, one meaning, everywhere in the code (variance convention of Ho et al. 2020)

    T               number of steps of a process (1000 for PixArt-Sigma)
    t               int64 (N,): index 0..T-1 into every table; 0 is the least noise. The papers' t is ours + 1
    timestep        what the network's time embedding receives: schedule.timesteps[t]
    betas           variance of the noise that one step adds; alphas = 1 - betas
    alpha_bar       cumulative product of alphas; alpha_bar_prev is the same one step earlier, and 1 at t = 0
    snr             signal-to-noise ratio alpha_bar / (1 - alpha_bar)
    sigma           noise-to-signal ratio of standard deviations, snr^(-1/2) (Karras et al. 2022)
    sigma_hat       where churn takes sigma before a step (Karras et al. 2022)
    beta tilde      variance of the posterior q(x_{t-1} | x_t, x_0): schedule.posterior_variance
    x0, x_t         data, and its noised version sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    y               x_t / sqrt(alpha_bar) = x0 + sigma eps, which the samplers on noise levels move
    eps             the accumulated standard normal noise inside x_t
    v               sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)
    score           gradient of log q(x_t), which is -eps / sqrt(1 - alpha_bar)
    step noise      sqrt(beta / (1 - alpha_bar)) eps: what Su's network predicts, the noise of one step

In the bodies, a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar). q_ names the fixed process, p the model.

Shapes: N batch, C latent channels, H and W latent size. Tables are float64 on the CPU and are cast at one
place, `process.at`. Half precision is promoted to float32 before any arithmetic; float64 stays float64.

Modules: names (the words), respacing (which steps to keep), schedules (tables), process (noising, conversions), sigmas
(noise levels and their grids), weighting (the law of t, loss weights), objectives (losses), solvers (sampling steps),
flow (the probability-flow ODE), likelihood (the bound and the probability-flow density).
"""
